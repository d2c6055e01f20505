"""What the five networks have in common: three outputs, of which a call returns one."""

from torch import Tensor, nn

from pipeline.backbones.config import BackboneConfig, FeatureInfo


class FeatureNetwork(nn.Module):
    """A network whose call returns logits, embeddings or feature maps, as it was made for.

    Attributes:
        config: Its name, sizes and preprocessing.
        features_only: A call returns feature maps.
        feature_info: The feature maps that it returns then, from the finest to the coarsest.
        num_features: Channels of ``forward_features``.
        embedding_dim: Width of the embedding.
    """

    feature_info: FeatureInfo
    num_features: int
    embedding_dim: int

    def __init__(self, config: BackboneConfig, *, features_only: bool) -> None:
        super().__init__()
        self.config = config
        self.features_only = features_only
        self._out_indices = tuple(range(len(self.feature_info)))

    def choose_maps(self, indices: tuple[int, ...]) -> None:
        """Return only some of the feature maps from now on; they keep their order."""
        self._out_indices = indices
        self.feature_info = FeatureInfo(self.feature_info[index] for index in indices)

    def forward(self, images: Tensor) -> Tensor | list[Tensor]:
        """Return logits (B, num_classes), embeddings (B, embedding_dim) or a list of feature maps.

        Args:
            images: Normalised RGB, float, (B, 3, H, W), sides of at least 18.
        """
        if not self.features_only:
            return self.forward_head(self.forward_features(images))
        maps = self.forward_maps(images)
        return [maps[index] for index in self._out_indices]

    def forward_features(self, images: Tensor) -> Tensor:
        """Return the last feature map, (B, num_features, H/32, W/32)."""
        raise NotImplementedError

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Return (B, num_classes), or the embedding (B, embedding_dim) with ``pre_logits``."""
        raise NotImplementedError

    def forward_maps(self, images: Tensor) -> list[Tensor]:
        """Return all feature maps, whichever a call returns."""
        raise NotImplementedError
