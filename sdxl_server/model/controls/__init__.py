"""Controls: models that make an image follow another image, such as drawn edges. Each kind has a file.

The operator registers controls. A request names some of them, each with an image. The compiled UNet takes what they
compute as further inputs, zeros without a control. So no request compiles anything.
"""
