"""The models to decompose: toys, a digits CNN, any user module; parameter selection; W0's fingerprint."""
