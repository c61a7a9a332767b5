"""The networks with which distillation is compared on CIFAR-100, with the tensor names of the field's checkpoints.

The definitions are those of RepDistiller (Tian et al., 2020), which mdistiller has as well. All are for images of about
32x32 pixels; their `avgpool` gives the penultimate vector as maps (channels, 1, 1).
"""
