"""Every numeric bound of the tests, one line of reason each; no other file holds one."""

# Float32 steps against the originals: measured 5e-7; their own distance from float64 is 3e-7.
SOLVER_RELATIVE_L2 = 2e-6
# Half the last printed digit of the eight-digit sigmas in REFERENCE.md 7.1; measured 4.9e-9.
SOLVER_PRINTED_DIGIT = 5e-9
# Sums of coefficients and one Euler step in float64: rounding, grown by weights of a few units.
SOLVER_FLOAT64 = 1e-12
# Error ratio when steps double, over a smooth stretch: measured within 2.5% of 2 to the order.
SOLVER_ORDER_RATIO = 0.05
# Order over a whole run: 2 less a logarithm from the singular ends of lambda; measured 1.69 up.
SOLVER_WHOLE_RUN_ORDER = 1.5

# DiT
DIT_TAP = 2e-6  # float32 sums in another order; a wrong GELU costs 4e-5, a wrong eps 4e-6
DIT_TIME = 1e-6  # float32 MLP on an exact sinusoid, against float64
DIT_SINUSOID = 2.5e-7  # four float32 roundings of numbers below 1

# Levels of 255, most of it 8-bit 4:2:0 colour: 1.3 at 832x480, 1.9 at 126x94.
MEDIA_MP4_MEAN_ERROR = 2.2

# UMT5
UMT5_TORCH_MULTIPLE = 3.0  # of torch's own float32 distance from float64
UMT5_TORCH_MULTIPLE_BFLOAT16 = 1.5  # of torch's own bfloat16 distance from float64
UMT5_FLOAT64 = 1e-12  # padding changes nothing but float64 sums
UMT5_PADDING = 1e-6  # longer or batched float32 sums in another order
UMT5_BFLOAT16 = 0.03  # eight bits through three layers; measured 0.01
UMT5_UNIT_NORM = 1e-3  # root mean square after the last norm, whose scale is one
UMT5_MATTERS = 0.01  # a real change of weights moves the result at least so far

# VAE
VAE_PARITY = 1e-5  # float32 convolutions summed in another order, through some fifty layers
VAE_STREAMING = 2e-6  # the same sums, split otherwise when a chunk is longer; measured 8e-7
VAE_BFLOAT16 = 2e-2  # some fifty roundings to 8 bits; measured 9e-3
VAE_CLAMPED_SHARE = 0.02  # values at the clamp compare as equal whatever they were

# DiT against the original Wan2.1 code
DIT_ORIGINAL = 2e-6  # float32 sums in another order; the original is 3.8e-7 from float64
DIT_ORIGINAL_BFLOAT16_RATIO = 1.05  # the same roundings fall otherwise; an extra one costs more
