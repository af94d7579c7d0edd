"""How features are arranged: neural collapse, class covariance, random-feature theory; how bad mistakes are."""

from timm_etf.geometry.covariance import class_covariance, covariance_differences, spectrum, total_variance
from timm_etf.geometry.mistakes import (
    average_hierarchical_precision,
    distance_at,
    expected_cost,
    of_neighbours,
    of_rankings,
    severity,
    sibling_neighbours,
)
from timm_etf.geometry.moments import ClassMoments, merged
from timm_etf.geometry.neural_collapse import collapse, effective_rank
from timm_etf.geometry.random_features import Activation, random_feature_regression, scaled

__all__ = [
    "Activation",
    "ClassMoments",
    "average_hierarchical_precision",
    "class_covariance",
    "collapse",
    "covariance_differences",
    "distance_at",
    "effective_rank",
    "expected_cost",
    "merged",
    "of_neighbours",
    "of_rankings",
    "random_feature_regression",
    "scaled",
    "severity",
    "sibling_neighbours",
    "spectrum",
    "total_variance",
]
