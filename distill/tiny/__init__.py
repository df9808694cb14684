"""How the shipped tiny pipelines and the shapes judge are made: trained on drawn images by the recipes in assets."""
