"""Sources of images, and how one is turned into a packed data set."""

# Every kind of source, with the module here whose function of that name lists it. `folders` has the
# kinds that may be archives, `arrays` those that hold pixels.
MODULES = {
    "imagenet": "imagenet", "folder": "folders", "tiny_imagenet": "folders",
    "imagenette": "folders", "cifar10": "arrays", "fashion_mnist": "arrays",
}  # fmt: skip
