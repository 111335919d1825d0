"""What a finished decomposition says: here, how it compares with the planted circuits of a toy."""
