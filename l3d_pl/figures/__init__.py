"""The paper's figures of a finished toy run: what is measured (`effects`), how it is drawn (`draw`), which (`make`)."""
