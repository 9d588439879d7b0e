"""Class logits by two convolutions."""

import flax.linen as nn
from jaxtyping import Array, Float

from contrastseg_jax.models.layers import HeadOutput, Watch, batch_norm, conv, unwatched


class FCNHead(nn.Module):
    """Class logits from features, as the original's `cls_head` in `lib/models/nets/hrnet.py`.

    With other widths and biases, every auxiliary head and the head of torchvision's FCN.
    """

    num_classes: int
    dropout_rate: float
    width: int = 0  # between the convolutions; 0: that of the features
    use_bias: tuple[bool, bool] = (True, False)  # of the 3x3 and the 1x1 convolution

    @nn.compact
    def __call__(
        self, x: Float[Array, "b hs ws c"], *, train: bool, watch: Watch = unwatched
    ) -> HeadOutput:
        """3x3 convolution, BN, ReLU, dropout of whole channels, 1x1 convolution."""
        of_first, of_last = self.use_bias
        x = conv(x, self.width or x.shape[-1], 3, use_bias=of_first, name="conv1")
        x = nn.relu(batch_norm(x, train=train, name="bn1"))
        x = nn.Dropout(self.dropout_rate, broadcast_dims=(1, 2), deterministic=not train)(x)
        logits = conv(watch(x), self.num_classes, 1, use_bias=of_last, name="conv2")
        return HeadOutput(logits, x)
