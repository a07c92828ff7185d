"""Universal lesion detection in CT with supervised 3D pre-training, on Ray."""
