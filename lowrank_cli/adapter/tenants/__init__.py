"""Many adapters on one model: the rows of a batch belong to different tenants."""
