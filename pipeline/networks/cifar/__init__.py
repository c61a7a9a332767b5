"""The networks with which distillation is compared on CIFAR-100, with the tensor names of the field's checkpoints.

The definitions are those of RepDistiller (Tian et al., 2020), which mdistiller has as well. All are for images of 32x32
pixels and a little more or less; their `avgpool` gives the penultimate vector as maps (channels, 1, 1).
"""
