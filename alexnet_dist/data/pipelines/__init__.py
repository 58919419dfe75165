"""Decoding and cropping, by torchvision or by DALI."""
