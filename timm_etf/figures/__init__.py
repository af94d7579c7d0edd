"""The paper's figures, on the features of any model: class covariance and collapse, random-feature regression."""
