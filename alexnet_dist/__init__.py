"""The 2012 AlexNet, trained as it was, in two columns on two devices, and as machines now allow."""

__version__ = "0.1.0"
