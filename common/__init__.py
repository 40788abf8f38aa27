"""What the stages stand on: config, weights on disk, training toolbox, data, images, metrics. Knows no stage."""
