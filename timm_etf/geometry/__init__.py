"""How features are arranged: neural collapse, class covariance, and what random-feature theory says of them."""

from timm_etf.geometry.covariance import class_covariance, covariance_differences, spectrum, total_variance
from timm_etf.geometry.moments import ClassMoments, merged
from timm_etf.geometry.neural_collapse import collapse, effective_rank
from timm_etf.geometry.random_features import Activation, random_feature_regression, scaled

__all__ = [
    "Activation",
    "ClassMoments",
    "class_covariance",
    "collapse",
    "covariance_differences",
    "effective_rank",
    "merged",
    "random_feature_regression",
    "scaled",
    "spectrum",
    "total_variance",
]
