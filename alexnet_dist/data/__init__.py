"""Images from source to window: prepare, packed data set, sampler, pipelines."""
