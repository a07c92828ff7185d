"""Forward pass and training step of MP3D in several layouts and precisions, beside a 2D detector; and layer by layer.

    python benchmarks/backbones.py [--device auto] [--size 512] [--clips 1] [--rounds 5] [--rows PATTERN]
                                   [--layers] [--compile]

The reference is the plain way to write the same network, with the same weights: ``conv3d`` and group norm over the
clip on contiguous float32 tensors, one kernel after the other, as the authors have it. Its answers are compared with
ours before anything is timed. Half precision is autocast; rows of it are there where the device computes in it.
torchvision's Faster R-CNN with ResNet-50 reads three slices as colours, ours nine.

Rows take turns, round after round; medians, of the processor's time or, with a GPU, of the clock. Float32 is there what
PyTorch makes of it unasked, convolutions of numbers rounded to ten bits (TF32), but when answers are compared. ``of the
peak`` is against a large product of matrices in bfloat16 (float32 where the device has no bfloat16) in the same run.
``--layers`` times each kind of convolution alone, in ours and in other layouts, against the least time that its
arithmetic or its bytes take.
"""

import argparse
import copy
import re
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from machine import device_name, seconds_of
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.detection import fasterrcnn_resnet50_fpn

from mp3d.config import ClipConfig, DetectionHead, ModelConfig
from mp3d.device import DeviceName, autocast, compile_layers, pick_device, put_on_device, resolve_precision
from mp3d.models import LesionDetector
from mp3d.models.folded import AlongZ, Conv, ConvNorm, fuse_batch_norms, to_columns
from mp3d.models.resnet import FoldedResNet, Stem
from mp3d.sample import Clip, Target

LARGEST_DIFFERENCE = 1e-4
"""Of the features of two layouts in float32, relative to their norm."""
TRAINING = {"forward": False, "training step": True}


@dataclass
class Row:
    part: str
    name: str
    run: Callable[[], object]
    flops: float = 0.0
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0


class SideBySide:
    """``AlongZ`` of five-dimensional tensors, where convolutions find their neighbours by themselves."""

    def add(self, ahead: Tensor, behind: Tensor) -> Tensor:
        return ahead + behind


class PlainConvNorm(nn.Module):
    """A convolution and a norm of ours, run as ``conv3d`` on ``(n, c, d, h, w)``."""

    def __init__(self, ours: ConvNorm) -> None:
        super().__init__()
        self.conv, self.norm = ours.conv, ours.norm

    def forward(self, x: Float[Tensor, "n c d h w"], z: object) -> Float[Tensor, "n o d h2 w2"]:
        conv = self.conv
        padding = [size // 2 for size in conv.kernel]
        x = F.conv3d(x, conv.weight, conv.bias, (1, conv.stride, conv.stride), padding)
        if isinstance(self.norm, nn.GroupNorm):  # PyTorch's, not ours
            return F.group_norm(x, self.norm.num_groups, self.norm.weight, self.norm.bias, self.norm.eps).to(x.dtype)
        return self.norm(x)


class PlainResNet(nn.Module):
    """A copy of a backbone of ours as it would be written without folding."""

    def __init__(self, ours: FoldedResNet) -> None:
        super().__init__()
        self.network = copy.deepcopy(ours)
        for module in list(self.network.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, ConvNorm):
                    setattr(module, name, PlainConvNorm(child))

    def forward(self, x: Float[Tensor, "n 1 d h w"]) -> list[Float[Tensor, "n c d h w"]]:
        z: Any = SideBySide()
        stem: Stem = self.network.stem
        x = F.max_pool3d(stem.convolved(x, z), 3, (1, 2, 2), 1)
        outputs = []
        for blocks in self.network.stages:
            for block in blocks:
                x = block(x, z)
            outputs.append(x)
        return outputs


def detector(norm: Any, size: int, device: torch.device, proposals: int = 300) -> LesionDetector:
    torch.manual_seed(0)
    head = DetectionHead(rpn_post_nms=(1000, proposals))
    model = LesionDetector(ModelConfig(norm=norm, head=head), ClipConfig(image_size=size))
    put_on_device(model, device)
    return model


def peak_flops(device: torch.device, dtype: torch.dtype | None) -> float:
    """Operations a second in a large product of matrices."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, side, side, device=device, dtype=dtype or torch.float32)
    return 2 * side**3 / statistics.median(seconds_of(lambda: a @ b, device) for _ in range(10))


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written a second."""
    source = torch.empty(2**30 if device.type == "cuda" else 2**28, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / statistics.median(seconds_of(lambda: target.copy_(source), device) for _ in range(10))


def flops_of(run: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def features(model: nn.Module, x: Tensor, device: torch.device, dtype: torch.dtype | None, trained: bool) -> Any:
    """A pass through a backbone; trained, with the gradients of all weights."""

    def run() -> list[Tensor]:
        for parameter in model.parameters():
            parameter.grad = None
        with torch.set_grad_enabled(trained), autocast(device, dtype):
            maps = model(x)
        if trained:
            torch.stack([each.float().mean() for each in maps]).sum().backward()
        return maps

    return run


def backbone_rows(args: argparse.Namespace, device: torch.device, half: torch.dtype | None) -> list[Row]:
    x = torch.randn(args.clips, 1, 9, args.size, args.size, device=device)
    ours = {norm: detector(norm, args.size, device).backbone.backbone for norm in ("gn3d", "slice_gn", "frozen_bn")}
    plain = PlainResNet(ours["gn3d"]).to(memory_format=torch.contiguous_format)
    torch.backends.cudnn.allow_tf32 = False
    with torch.no_grad():
        for name, other in (
            ("conv3d, contiguous", x),
            ("conv3d, channels-last", x.to(memory_format=torch.channels_last_3d)),
        ):
            for theirs, own in zip(plain(other), ours["gn3d"](x), strict=True):
                difference = (theirs - own).norm() / own.norm()
                if difference > LARGEST_DIFFERENCE:
                    raise ValueError(f"{name} gives other features than ours: {difference:.1e}")
    torch.backends.cudnn.allow_tf32 = True
    last = copy.deepcopy(plain).to(memory_format=torch.channels_last_3d)
    fused = copy.deepcopy(ours["frozen_bn"]).eval()
    fuse_batch_norms(fused)
    variants: list[tuple[str, nn.Module, torch.dtype | None]] = [("plain: conv3d, contiguous", plain, None)]
    variants += [("ours: folded, published norm", ours["gn3d"], None), ("ours: folded", ours["slice_gn"], None)]
    if half:
        variants += [
            ("conv3d, contiguous", plain, half),
            ("conv3d, channels-last", last, half),
            ("ours: folded, published norm", ours["gn3d"], half),
            ("ours: folded", ours["slice_gn"], half),
            ("ours: folded, frozen batch norm", ours["frozen_bn"], half),
        ]
    variants.append(("ours: folded, batch norm fused", fused, half))
    if args.compile:
        for name, model in (("ours: folded", ours["slice_gn"]), ("ours: folded, batch norm fused", fused)):
            compiled = copy.deepcopy(model)
            compiled.compile(dynamic=False)
            variants.append((f"{name}, compiled", compiled, half))
    rows = []
    for part, trained in TRAINING.items():
        for name, model, dtype in variants:
            if trained and "fused" in name:
                continue
            layout = torch.channels_last_3d if "channels-last" in name else torch.contiguous_format
            given = x.to(memory_format=layout)
            run = features(model, given, device, dtype, trained)
            precision = "fp32" if dtype is None else str(dtype).removeprefix("torch.")
            flops = 0.0 if "compiled" in name else flops_of(run)
            rows.append(Row(f"backbone, {part}", f"{name}, {precision}", run, flops))
    known = {row.part: row.flops for row in rows if row.flops}
    for row in rows:
        row.flops = row.flops or known[row.part]
    return rows


def detector_rows(args: argparse.Namespace, device: torch.device, half: torch.dtype | None) -> list[Row]:
    """Everything from slices in HU to losses or boxes; a picture of torchvision's for each clip of ours."""
    size, clips = args.size, args.clips
    slices = [torch.randint(-1024, 1050, (9, size, size), dtype=torch.int16).to(device) for _ in range(clips)]
    corners = torch.tensor([[0.1, 0.1, 0.2, 0.15], [0.3, 0.4, 0.35, 0.5]], device=device) * size
    targets = [Target(boxes=corners, labels=torch.ones(2, dtype=torch.int64, device=device))] * clips
    pictures = [torch.rand(3, size, size, device=device) for _ in range(clips)]
    torch.manual_seed(0)
    flat = fasterrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=2, min_size=size, max_size=size,
        rpn_post_nms_top_n_train=1000, rpn_post_nms_top_n_test=300,
    )  # fmt: skip
    put_on_device(flat, device)
    ours = detector("slice_gn", size, device)
    compiled = None
    if args.compile:
        compiled = copy.deepcopy(ours)
        compile_layers(compiled)

    def run_of(model: Any, given: Any, dtype: torch.dtype | None, trained: bool) -> Callable[[], object]:
        def run() -> object:
            model.train(trained)
            for parameter in model.parameters():
                parameter.grad = None
            with torch.set_grad_enabled(trained), autocast(device, dtype):
                answer = model(given, targets) if trained else model(given)
            if trained:
                torch.stack(list(answer.values())).sum().backward()
            return answer

        return run

    given = [Clip(each, (4,)) for each in slices]
    rows = []
    for part, trained in TRAINING.items():
        for dtype in [None, half] if half else [None]:
            precision = "fp32" if dtype is None else str(dtype).removeprefix("torch.")
            rows.append(
                Row(
                    f"detector, {part}",
                    f"torchvision 2D, 3 slices, {precision}",
                    run_of(flat, pictures, dtype, trained),
                )
            )
            rows.append(Row(f"detector, {part}", f"ours, {precision}", run_of(ours, given, dtype, trained)))
            if compiled is not None and dtype is half:
                run = run_of(compiled, given, dtype, trained)
                rows.append(Row(f"detector, {part}", f"ours, compiled, {precision}", run))
    return rows


def time_rows(rows: list[Row], rounds: int, device: torch.device) -> None:
    for row in rows:
        for _ in range(3 if device.type == "cuda" else 1):
            row.run()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            row.run()
            row.peak_bytes = torch.cuda.max_memory_allocated() - before
    for number in range(rounds):
        for row in rows:
            row.seconds.append(seconds_of(row.run, device))
        print(f"round {number + 1}/{rounds}", file=sys.stderr, flush=True)


def print_rows(rows: list[Row], unit: float, peak: float) -> None:
    print("| what | way | ms | first of its kind over it | of the peak | memory, MB |")
    print("| --- | --- | --- | --- | --- | --- |")
    first: dict[str, float] = {}
    for row in rows:
        median = statistics.median(row.seconds)
        reference = first.setdefault(row.part, median)
        share = f"{row.flops / median / peak:.0%}" if row.flops else ""
        memory = f"{row.peak_bytes / 2**20:.0f}" if row.peak_bytes else ""
        print(f"| {row.part} | {row.name} | {median * unit:.2f} | {reference / median:.2f} | {share} | {memory} |")


def layer_table(args: argparse.Namespace, device: torch.device, half: torch.dtype | None, peak: float) -> None:
    """Each kind of convolution of the backbone alone."""
    backbone = detector("slice_gn", args.size, device).backbone.backbone
    seen: dict[tuple[object, ...], tuple[Conv, Tensor, AlongZ]] = {}

    def note(module: nn.Module, inputs: tuple[Any, ...], _output: Tensor) -> None:
        assert isinstance(module, Conv)
        x, z = inputs
        seen.setdefault((*module.weight.shape, module.stride, *x.shape), (module, x, z))

    hooks = [module.register_forward_hook(note) for module in backbone.modules() if isinstance(module, Conv)]
    with torch.no_grad():
        backbone(torch.randn(args.clips, 1, 9, args.size, args.size, device=device))
    for hook in hooks:
        hook.remove()
    bandwidth, dtype = copy_bandwidth(device), half or torch.float32
    print(f"copy: {bandwidth / 1e12:.2f} TB/s, reads and writes\n")
    print(
        "| kernel, channels, stride, rows | pass | ours, us | of its least time | conv3d, contiguous, over ours ",
        end="",
    )
    print("| channels-last conv3d | columns in 2D |\n" + "| --- " * 7 + "|")
    for conv, given, z in seen.values():
        kd, kh, kw = conv.kernel
        outputs, inputs = conv.weight.shape[:2]
        folded = given.to(dtype)
        clips = folded.unflatten(0, (args.clips, 9)).transpose(1, 2)
        ours = copy.deepcopy(conv).to(dtype)
        three = partial(F.conv3d, stride=(1, conv.stride, conv.stride), padding=(kd // 2, kh // 2, kw // 2))
        contiguous = ours.weight.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
        last = ours.weight.detach().clone(memory_format=torch.channels_last_3d).requires_grad_()
        ways: dict[str, tuple[Callable[[Tensor], Tensor], Tensor, Tensor]] = {
            "ours": (lambda t, ours=ours, z=z: ours(t, z), folded, ours.weight),
            "contiguous": (partial(three, weight=contiguous), clips.contiguous(), contiguous),
            "last": (partial(three, weight=last), clips, last),
        }
        if kd == 3 and conv.stride == 1:
            columns = ours.weight.detach().clone().requires_grad_()
            ways["columns"] = (
                lambda t, w=columns: F.conv2d(t, w.squeeze(4), padding=(1, 0)), to_columns(folded, 9), columns
            )  # fmt: skip
        for name, trained in TRAINING.items():
            rows = [Row("", way, pass_through(run, t, w, trained)) for way, (run, t, w) in ways.items()]
            time_rows(rows, args.rounds, device)
            medians = {row.name: statistics.median(row.seconds) for row in rows}
            size = ours(folded, z).numel()
            operations, values = 2 * size * conv.weight[0].numel(), folded.numel() + size + conv.weight.numel()
            least = max(operations / peak, values * folded.element_size() / bandwidth) * (
                2 + (inputs > 1) if trained else 1
            )
            cells = [f"{medians[way] / medians['ours']:.2f}" if way in medians else "" for way in list(ways)[1:]]
            print(
                f"| {kd}x{kh}x{kw}, {inputs} to {outputs}, {conv.stride}, {given.shape[2]} | {name} "
                f"| {medians['ours'] * 1e6:.0f} | {medians['ours'] / least:.1f} | {' | '.join(cells)} |",
                flush=True,
            )


def pass_through(run: Callable[[Tensor], Tensor], given: Tensor, weight: Tensor, trained: bool) -> Callable[[], None]:
    """A layer's forward pass; trained, with the gradients of weight and, but for the first layer, input."""
    x = given.detach().requires_grad_(trained and weight.shape[1] > 1)
    with torch.no_grad():
        gradient = torch.randn_like(run(x))

    def go() -> None:
        x.grad = weight.grad = None
        with torch.set_grad_enabled(trained):
            y = run(x)
        if trained:
            y.backward(gradient)

    return go


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "gpu"])
    parser.add_argument("--size", type=int, default=512, help="rows and columns")
    parser.add_argument("--clips", type=int, default=1, help="in a batch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--layers", action="store_true", help="each kind of convolution alone, and nothing else")
    parser.add_argument("--compile", action="store_true", help="with rows that torch.compile made, in minutes")
    parser.add_argument("--rows", default="", help="only rows whose text matches, e.g. 'backbone.*bfloat16'")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    choice: DeviceName = args.device
    device = pick_device(choice)
    half = resolve_precision("auto", device)
    name = device_name(device, args.threads)
    peak = peak_flops(device, half)
    print(f"{name}, torch {torch.__version__}; matrices {peak / 1e12:.2f} TFLOP/s in {half or torch.float32}")
    print(f"{args.clips} clip(s) of nine slices of {args.size} x {args.size}, medians of {args.rounds} rounds\n")
    if args.layers:
        return layer_table(args, device, half, peak)
    rows = backbone_rows(args, device, half) + detector_rows(args, device, half)
    rows = [row for row in rows if re.search(args.rows, f"{row.part}, {row.name}")]
    time_rows(rows, args.rounds, device)
    print_rows(rows, 1000, peak)
    return None


if __name__ == "__main__":
    main()
