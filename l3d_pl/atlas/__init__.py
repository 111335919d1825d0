"""The pages and pictures that show a decomposition: static files, no server, no network."""
