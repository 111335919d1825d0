"""`l3d plan`: what a run takes on so many GPUs, strategy by strategy, before a job is submitted.

Nothing is computed: the target, V and a batch are on torch's meta device, as shapes.

    shapes       the frozen model's passes over a batch, run there as they are
    costs        the step with V and the captured gradients, by formula
    strategies   both laid out over so many ranks: memory, bytes sent
    report       which strategy to take; tables

Memory is that of the rank that needs most: one that starts and repairs, and so holds the anchors. GB are 1e9 bytes.
"""
