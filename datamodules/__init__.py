"""Lightning data modules. They know nothing of L3D. A batch is a dict: `inputs`, and `labels` where there are any."""
