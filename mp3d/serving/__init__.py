"""The Serve application: a zip of one CT series in, findings out.

    body ─► api (limits) ─► engine: archive (guards) ─► mp3d.data.dicom (series, geometry) ─► mp3d.predict ─► answer

Everything but ``deployment`` runs without Ray.
"""
