"""SPHERE in other people's code: a line in a forward pass (`regularizer`), a module watched from outside (`hooks`)."""
