"""The store: netCDF-4-readable HDF5 files, one or a series of them, read and written."""
