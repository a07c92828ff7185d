"""A made world in true formats: small CT series with outlined lesions, and small colour pictures.

For the demo of those who have no data at hand, and for the tests. Nothing reads these files by special code.
"""

from mp3d.data.synthetic.bad import write_bad_files
from mp3d.data.synthetic.ct import PatientTruth, Spot, WorldTruth, write_ct_world
from mp3d.data.synthetic.pictures import write_picture_world

__all__ = ["PatientTruth", "Spot", "WorldTruth", "write_bad_files", "write_ct_world", "write_picture_world"]
