"""Every numeric bound of the tests, one line of reason each; no other file holds one."""

# Float32 steps against the originals: measured 5e-7; their own distance from float64 is 3e-7.
SOLVER_RELATIVE_L2 = 2e-6
# Half the last printed digit of the eight-digit golden sigmas; measured 4.9e-9.
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
MEDIA_GIF_MEAN_ERROR = 4.0  # 256 of all colours there are: 3.3; neighbours in time are 13 apart
MEDIA_WEBP_MEAN_ERROR = 2.2  # 8-bit 4:2:0 colour: 1.8 at 33x17, 0.7 at 126x94

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
VAE_STREAMING = 1e-6  # the same sums, split otherwise when a chunk is longer; measured 8e-7
VAE_COLUMNS = 2e-6  # float32 sums of narrower arrays in another order; measured 6e-7
VAE_TILES = 2e-6  # the same sums over narrower arrays, perhaps in another order; measured 2e-7
VAE_MEMORY = 0.12  # a formula against the CPU compiler's programs; measured 0.1 less
VAE_BFLOAT16 = 2e-2  # some fifty roundings to 8 bits; measured 9e-3
VAE_BFLOAT16_SMALL = 0.1  # the same where sums of few random channels cancel; measured 4e-2
VAE_CLAMPED_SHARE = 0.02  # values at the clamp compare as equal whatever they were

# DiT against the original Wan2.1 code
DIT_ORIGINAL = 2e-6  # float32 sums in another order: measured 6e-7, the original's own 4e-7
# The same roundings in other places: 0.95 to 1.01 over 12 seeds; a bfloat16 residual stream 1.24.
DIT_ORIGINAL_BFLOAT16_RATIO = 1.05

# The residual stream on Hopper
RESIDUAL_SUM = 2e-7  # of up to four in float32; measured 4.4e-8
RESIDUAL_NORM = 3e-3  # rounded to 8 bits; measured 1.7e-3
RESIDUAL_SAME = 1e-6  # the same float32 roundings; measured 0; a sum in bfloat16 costs 2e-3
RESIDUAL_BLOCKS = 1e-4  # the same roundings through three blocks; measured 0
RESIDUAL_BLOCKS_GRADIENT = 2e-3  # measured 0, and 3.9e-4 of the modulation

# Pipeline: text, solver, guidance and VAE together
PIPELINE_LATENTS = 1e-5  # eight guided float32 steps; measured 2.8e-6; a wrong GELU costs 6e-5
PIPELINE_PSNR = 95.0  # dB of frames in -1..1; measured 131
PIPELINE_CLAMPED_SHARE = 0.05  # values at the clamp compare as equal whatever they were
PIPELINE_MATTERS = 0.003  # another prompt, seed or setting moves latents at least so far

# Rotary tables
ROPE_PRINTED_DIGIT = 5e-9  # half the last of eight printed digits
ROPE_PRINTED_SMALL = 4e-5  # half the last of five printed digits, relative
ROPE_ROTATION = 2.5e-7  # tables, two products and a sum in float32; measured 7e-8
ROPE_OFFSET = 3e-6  # float32 rotations, then 48 products that partly cancel; measured 6e-7

# Products and norms
LAYERS_SAME = 1e-6  # float32 roundings of the same formula
LAYERS_TWICE_ROUNDED = 2e-2  # bfloat16 sums of few terms rounded once or twice more

# Attention
ATTENTION_FLOAT32 = 1e-6  # float32 sums, rescaled once a chunk; measured 3.5e-7
ATTENTION_BFLOAT16 = 5e-3  # weights and the result are rounded to 8 bits; measured 2.3e-3
ATTENTION_CHUNKED_SHARE = 0.5  # of all scores; two blocks of them are 0.25 of what is tested
ATTENTION_TPU_OPERANDS = 6.0  # q, k, v, the result, a copy; one head of scores is 42
IMAGE_TPU_STEP_GIB = 31.25  # what a v6e chip has for programs; measured 28.0
STREAMED_TPU_STEP = 0.22  # that the formula's 13.0 GiB may be too much; measured 10.4, 0.20 less
ATTENTION_TPU_STEP_GIB = 5.0  # measured 3.9, of which weights and text keys are 2.6

# Noise
NOISE_GOLDEN = 1e-6  # threefry's bits are exact, the inverse error function is float32
NOISE_CORRELATION = 0.25  # five standard deviations of 384 values; measured 0.18
NOISE_MOMENTS = 0.06  # two standard deviations of the fourth moment of 131072 values

# Sampler
SAMPLER_STEP = 1e-6  # a few float32 sums of known numbers
SAMPLER_RUN = 1e-5  # the same over a few steps, or of sums that nearly cancel
SAMPLER_MATTERS = 0.01  # guidance and conditions move the latents at least so far

PIPELINE_MEMBER = 1e-5  # float32 sums in another order when the batch is larger; measured 0
PIPELINE_LEVEL = 0.01  # of one of 255: a float32 frame beside the one its program truncated
PIPELINE_BFLOAT16 = 0.02  # eight bits through two networks, grown by guidance; measured 5e-3

# CLIP
CLIP_TORCH_MULTIPLE = 3.0  # of torch's own float32 distance from float64; measured 0.8
CLIP_TORCH_MULTIPLE_BFLOAT16 = 1.5  # of torch's own bfloat16 distance from float64; measured 0.93
CLIP_BFLOAT16 = 0.02  # eight bits through three blocks and the residual stream; measured 7e-3
CLIP_PADDING = 1e-6  # longer or batched float32 sums in another order; measured 1e-7
CLIP_FLOAT32 = 2.5e-7  # a few float32 roundings of numbers near 1; measured 9e-8
CLIP_MATTERS = 0.01  # a real change moves the result at least so far

# Images and conditioning
IMAGE_LEVEL = 2.5e-7  # two float32 roundings of numbers up to 1
IMAGE_JPEG = 0.03  # of -1..1: blocks of one colour at the best quality, 4 levels of 255
IMAGE_RESIZE = 1e-5  # float32 sums in another order; measured 2e-6, positions without FMA 7e-4
IMAGE_FLAT = 1e-6  # sixteen float32 weights that add up to one
CONDITIONING_LATENTS = 1e-5  # resizes 2e-6 apart through a VAE; measured 8e-7

# Image to video: the whole of it
IMAGE_PIPELINE_LATENTS = 1e-5  # six guided steps; measured 5e-6; a wrong GELU in CLIP costs 4e-5
IMAGE_PIPELINE_PSNR = 95.0  # dB of frames in -1..1; measured 128

# LoRA
LORA_MERGE = 1e-6  # a float32 product of a few terms and two sums; measured 5e-8
LORA_ROUNDED_SHARE = 2e-3  # float32 sums that fall beside a tie of bfloat16; measured 0
LORA_TWICE_ROUNDED_SHARE = 0.05  # of values that a second rounding moves, at least; measured 0.27
LORA_DIFFUSERS = 2e-6  # merged, or beside the product as in PEFT: float32 sums; measured 5e-7
LORA_MATTERS = 0.01  # a LoRA moves the output of the DiT at least so far

# Training
TRAINING_FORMULA = 1e-5  # float32 sums of known numbers
TRAINING_ATTACHED = 1e-6  # factors beside a product, or in its kernel: float32 sums; measured 4e-7
TRAINING_FOLDED = 1e-3  # padding as one token: terms of keys' gradients cancel; measured 2.5e-4
TRAINING_REMAT = 1e-4  # the same sums, fused otherwise: terms of keys' gradients cancel
SPREAD = 1e-5  # latents of eight steps whose float32 sums are split over devices; measured 3e-7
TRAINING_SHARDED = 1e-5  # losses of three steps, whose float32 sums are split over four devices
TRAINING_GRADIENT = 1e-2  # of bfloat16 products: rounded once to 8 bits
TRAINING_OVERFIT = 0.8  # of the first losses is left when two clips have been learned a little
TRAINING_OVERFIT_LORA = 0.93  # the same of a LoRA beside random kernels

# Training data
DATA_LATENTS = 1e-6  # one program over a whole video sums as the chunks do; measured 3.4e-7
DATA_SCALED = 2.2  # levels of 255: 8-bit 4:2:0 colour, resized by ffmpeg and by Pillow
DATA_ALIAS = 0.02  # of -1..1: what is left of a checkerboard of single pixels at a quarter

# The miniature
MINIATURE_PSNR = 95.0  # dB of frames in -1..1 after twenty guided steps; measured 133 to 134
MINIATURE_BFLOAT16 = 45.0  # dB of frames to those in float32; measured 52 to 57
# dB of a frame to the one that was given; the means of 100 clips are 33 and 34, the least 25
MINIATURE_FIRST_FRAME = 28.0
MINIATURE_LAST_FRAME = 26.0
MINIATURE_VAE = 34.0  # dB of clips through the latents and back; measured 39, the worst 35
MINIATURE_SHOWS = 0.01  # standard deviation of frames that are not all of one colour

# Estimates
COSTS_PRINTED = 0.005  # TFLOP that were reckoned by hand, to three digits
COSTS_MEMORY = 0.3  # of a block's temporaries as they compile: 0.99 to 1.25 times those
COSTS_LESS = 1.05  # so much less than is needed the formula may give: a budget's margin
COSTS_SECONDS = 0.1  # of a forward measured on an H200: 1.00 times for the 14B, 0.93 for the 1.3B
AOT_ROOM = 0.9  # of a TPU's memory at most, of the 14B at 720P; measured 0.56 (tpu7x:2x2x1) at most
AOT_MEMORY = 0.3  # of a step's memory by formula and as compiled for TPUs

# Products and attention of 8 bits
FP8_BFLOAT16 = 4e-3  # what is exact is rounded to bfloat16 once or twice; measured 1.8e-3
FP8_WEIGHTS = 0.03  # one rounding to four bits; measured 0.027
FP8_PRODUCT = 0.05  # two of them in every term; measured 0.039
FP8_ATTENTION = 0.05  # of scores, weights, values and the result; measured 0.033
FP8_MATTERS = 5e-3  # it is rounded at all; measured 0.027
FP8_SAME = 2e-3  # the same roundings, but where float32 sums lie beside a tie; measured 2e-8
FP8_MEANS = 5e-3  # the same numbers after another subtraction, but beside a tie; measured 1.4e-6
FP8_PADDING = 1e-3  # less than 1 of 256 of what is left beside the mean; measured 1.1e-4
FP8_SPREAD = 5e-3  # beside a tie; measured 0, in a ring, whose parts are bfloat16, 1e-3
FP8_VIDEO = 0.1  # latents of two guided steps, from those in bfloat16; measured 0.038
