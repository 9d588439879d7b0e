"""Every setting, its default and what it means: the schema that all other configs start from.

A config file offers `get_config("MODEL[,VARIANT]")`; VARIANT is ce (cross entropy alone), contrast
(plus pixel contrast inside the batch), memory (contrast with the memory bank as well) or pretrain
(contrast alone, for a run of ce or contrast to start from with `model.init_from`).
"""

from ml_collections import ConfigDict

from contrastseg_jax.config.tree import Config, replaced

# What each variant sets. Contrast alone is that of Zhao et al., "Contrastive Learning for
# Label-Efficient Semantic Segmentation", ICCV 2021: anchors that no prediction chooses, temperature
# 0.07, distorted colours.
VARIANTS = {
    "ce": {"contrast.candidates": "none"},
    "contrast": {"contrast.candidates": "batch"},
    "memory": {"contrast.candidates": "both"},
    "pretrain": {
        "contrast.candidates": "batch",
        "loss.segmentation_weight": 0.0,
        "contrast.anchors": "random",
        "contrast.temperature": 0.07,
        "augment.color_distortion": 1.0,
    },
}


def get_config(spec: str = "hrnet_w48,memory") -> Config:
    """The default config for a network and a variant, e.g. "hrnet_w48,memory"."""
    model, _, variant = spec.partition(",")
    variant = variant or "memory"
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r}: must be one of {', '.join(VARIANTS)}")
    config: Config = ConfigDict()
    config.seed = 0  # of initialisation, sampling, shuffling and augmentation

    config.data = data = ConfigDict()
    # cityscapes, pascal_context, coco_stuff10k, coco_stuff164k, camvid, ade20k, landcover, folder,
    # tfds (any data set of TFDS) or synthetic
    data.name = "folder"
    data.root = ""  # folder that holds the raw data set; tfds: its own, or ~/tensorflow_datasets
    data.prepared_dir = "~/.cache/contrastseg_jax"  # where prepared data sets are kept
    data.class_names = ()  # folder, tfds: the classes, in the order of their mask values
    data.ignore_values = (255,)  # folder, tfds: mask values that are no class
    # folder, tfds: what a mask's pixel is. index: its class; rgb: the colour of its class, in
    # data.palette; binary: 0 for the first of two classes, any other value for the second.
    data.mask_encoding = "index"
    # The colour of each class for rgb, in the order of class_names: ('#800000', (0, 128, 0)); or a
    # file of rows "r g b name" or "#rrggbb name", whose names are the classes where none are given.
    data.palette = ()
    # Colours for rgb that are no class; those named void, ignore or unlabeled in the file of
    # data.palette as well. Any other colour that is not in the palette, black too, is an error.
    data.ignore_colors = ()
    # Pixels of images as stored, or applied: rotated by EXIF orientation. Masks never are.
    data.exif_orientation = "stored"
    # Bits that the values of images with more than 8 have: 8 to 16, the upper 8 of which are kept.
    # 0: as each file says, and one whose values leave the upper quarters of its range unused, as
    # those of 12 bits in 16 do, is refused.
    data.bit_depth = 0
    # Part of the training images to train on: a share (0.125), a number (46) or a file that lists
    # names, one a line. Drawn by a fixed seed, smaller parts inside larger ones. Empty: all.
    data.train_subset = ""
    # What to train on, in this order: also ("train", "val"), for a benchmark's server to score test
    # (original: --include_val), or, of Cityscapes, "train_extra" with its coarse labels.
    data.train_splits = ("train",)
    # folder without a val: the share of its images that is drawn for one, the same in every run;
    # 0: it has train and val.
    data.val_fraction = 0.0
    # What is drawn whole: sequence (images of one sub-folder, or of one name up to its last
    # number), or image.
    data.val_unit = "sequence"
    data.short_side = 0  # resize images to this short side first; 0: keep the size
    data.cache_size = 0  # decoded images kept in memory, by each process that makes batches
    data.num_threads = 4  # that read and augment, in each of the processes that do
    data.num_workers = 0  # processes that make training batches; 0: threads of this one
    data.prefetch = 8  # batches made ahead of the step that needs them

    data.tfds = ConfigDict()  # the data set of TFDS that data.name = "tfds" uses
    data.tfds.dataset = ""  # its name there, e.g. oxford_iiit_pet
    data.tfds.image_feature = "image"  # the image's name in its examples
    data.tfds.label_feature = "label"  # the mask's name in its examples
    data.tfds.train_split = "train"  # what to train on, e.g. train[:90%]
    data.tfds.val_split = "validation"  # what to validate on, e.g. train[90%:]

    data.synthetic = ConfigDict()  # the generated data set, for tests and benchmarks
    data.synthetic.image_size = (64, 96)  # height, width
    data.synthetic.num_classes = 5
    data.synthetic.num_examples = (32, 8)  # train, val

    config.augment = augment = ConfigDict()
    augment.crop_size = (512, 1024)  # height, width (original: Cityscapes)
    augment.scale_range = (0.5, 2.0)  # of random resizing (original: all data sets)
    augment.aspect_range = (0.9, 1.1)  # of width over height (original: all data sets)
    augment.flip_rate = 0.5  # share of images mirrored left to right
    augment.brightness = 10  # largest shift of all channels, grey levels (original: 10)
    augment.color_distortion = 0.0  # brightness, contrast, saturation, hue; 1: as SSD (original: 0)
    # Share of crops around a pixel of a class drawn uniformly from the image's (original: 0).
    augment.class_uniform_rate = 0.0
    augment.blur_rate = 0.0  # share of crops blurred by a Gaussian of 0.1 to 2 pixels (original: 0)
    augment.erase_rate = 0.0  # share of crops with an erased rectangle, ignored (original: 0)
    # Share of crops with half of the classes of the next crop pasted in (original: 0). ClassMix;
    # such a crop is read and made as well, so 0.5 costs half as much time again.
    augment.class_mix_rate = 0.0

    config.model = net = ConfigDict()
    net.name = model  # see `contrastseg_jax/models/zoo.py`
    # What the projection head reads: features, as the segmentation head does (original), or last,
    # what the segmentation head's last convolution reads.
    net.proj_input = "features"
    net.proj_dim = 256  # length of an embedding (paper: 256)
    net.dropout_rate = -1.0  # in front of the logits; -1: as the network's original has it
    net.init_from = ""  # run, or folder of --mode=convert, to start from its weights; empty: none
    net.dtype = "float32"  # in which layers compute, or bfloat16; parameters stay float32
    net.remat = ()  # stages computed again for the gradient, to save memory, e.g. ("stage4",)
    # Parts that are not trained, BatchNorm statistics included: backbone, all of it, or some of it,
    # e.g. ("stem", "layer1").
    net.freeze = ()
    # How the network takes images. Empty: as the weights of init_from do, or ImageNet's way.
    net.image_mean = ()  # red, green, blue, subtracted (ImageNet: 123.675, 116.28, 103.53)
    net.image_std = ()  # red, green, blue, divided by (ImageNet: 58.395, 57.12, 57.375)
    net.channel_order = ""  # RGB or BGR

    config.loss = loss = ConfigDict()
    # Of the sum of loss.terms, the auxiliary head's included; 0: contrast alone, as pre-training
    # (Zhao et al., ICCV 2021).
    loss.segmentation_weight = 1.0
    loss.ramp_steps = 0  # in which that weight rises from 0, linearly
    # Of cross entropy, OHEM and focal loss: one per class; empty: all 1. (The other terms count
    # every class alike.)
    loss.class_weights = ()
    # Where class weights come from: given, as loss.class_weights, or the pixels of the training
    # images, by median_frequency (Eigen & Fergus, ICCV 2015) or enet (Paszke et al., 2016).
    loss.class_weighting = "given"
    loss.aux_weight = 0.4  # of an auxiliary head's loss, where a network has one

    loss.terms = ConfigDict()  # the weight of each loss in their sum; 0: not computed
    loss.terms.cross_entropy = 1.0
    loss.terms.ohem = 0.0  # cross entropy of the hardest pixels, in place of that of all
    loss.terms.focal = 0.0  # cross entropy that weighs certain pixels less
    loss.terms.lovasz = 0.0  # the IoU of each class (original: 1 beside cross entropy)
    loss.terms.rmi = 0.0  # region mutual information (original: 1 alone)
    loss.terms.dice = 0.0  # the overlap of each class

    loss.cross_entropy = ConfigDict()
    loss.cross_entropy.label_smoothing = 0.0  # share of the target that all classes have alike

    loss.ohem = ConfigDict()
    # Probability of the true class below which a pixel counts (original: 0.7, with HRNet 0.9).
    loss.ohem.threshold = 0.7
    loss.ohem.min_kept = 100_000  # pixels of a batch that count at least (original: of a GPU's)

    loss.focal = ConfigDict()
    loss.focal.gamma = 2.0  # power of 1 - p (paper: 2)

    loss.rmi = ConfigDict()
    loss.rmi.radius = 3  # side of a region, in pooled pixels (original: 3)
    loss.rmi.pool_size = 3  # and stride of the max-pooling before it (original: 3)
    loss.rmi.bce_share = 0.5  # of binary cross entropy; RMI has the rest (original: 0.5)

    loss.dice = ConfigDict()
    loss.dice.smooth = 0.0  # pixels added to numerator and denominator

    config.contrast = contrast = ConfigDict()
    contrast.candidates = "none"  # none, batch (the global one), memory or both
    contrast.loss_weight = 0.1  # of the contrast loss (original: 0.1, with its bank 1)
    contrast.anchors = "hard"  # hard: half of the anchors mispredicted pixels; random: any
    # Sampled from each image; 0: a sixteenth of the cells of its map of embeddings, at least 16 and
    # at most 512 (original: 1024 for the 2 images of a GPU).
    contrast.anchors_per_image = 0
    contrast.max_views = 100  # most anchors of one class in one image (original: 100)
    contrast.positives = "all"  # of an anchor: all, random, hardest or semi_hard (paper)
    contrast.negatives = "all"  # likewise; semi_hard: at random out of the hardest tenth
    contrast.num_positives = 1024  # of an anchor, unless all (paper: 1024)
    contrast.num_negatives = 2048  # of an anchor, unless all (paper: 2048)
    contrast.approximate = False  # find the hardest by lax.approx_max_k, fast on a TPU
    contrast.temperature = 0.1  # (paper: 0.1)
    contrast.base_temperature = 0.07  # the loss is scaled by temperature / this (original)
    # Steps before the contrast loss counts, beside another loss (original: 5000).
    contrast.warmup_steps = 5000
    contrast.ramp_steps = 0  # in which its weight then rises from 0, linearly (original: 0)

    config.memory = memory = ConfigDict()
    memory.pixel_size = 5000  # slots per class of the pixel queue; 0: none (original: 5000)
    memory.segment_size = 5000  # slots per class of the segment queue; 0: none (original: 5000)
    memory.pixels_per_class = 10  # enqueued per class and image (paper: 10)
    # Pixels that keys are made of: all, or correct, those that the network predicts correctly
    # (original: all; Alonso et al., ICCV 2021: correct, by their EMA).
    memory.key_pixels = "all"
    memory.key_network = "online"  # that makes the keys: online, the one in training, or its ema
    memory.dtype = "float32"  # in which the bank is stored: float32 or bfloat16
    memory.sharding = "replicated"  # whole on every device, or slots: a part of them on each

    config.optim = optim = ConfigDict()
    optim.name = "sgd"  # sgd with momentum (original), or adamw
    optim.learning_rate = 0.01  # at step 0 (original: 0.01); adamw wants a hundredth of it
    optim.head_lr_multiplier = 1.0  # of all but the backbone (original: 1, two data sets 10)
    optim.schedule = "poly"  # of the learning rate: poly (original) or cosine, to 0, or constant
    optim.warmup_steps = 0  # in which the learning rate rises from 0 (original: 0)
    optim.poly_power = 0.9  # learning_rate * (1 - step / num_steps) ** poly_power (original: 0.9)
    optim.momentum = 0.9  # of sgd (original: 0.9)
    optim.betas = (0.9, 0.999)  # of adamw: decay of its means of gradients and of their squares
    optim.weight_decay = 5e-4  # (original: 5e-4); of adamw times the learning rate alone
    optim.decayed = "all"  # what decays: all parameters (original), or kernels: no norm, no bias
    optim.clip_norm = 0.0  # largest norm of a step's whole gradient; 0: any (original: any)
    optim.ema_decay = 0.0  # of running averages of the variables, to evaluate with; 0: none

    config.train = train = ConfigDict()
    train.batch_size = 8  # images per step over all devices (original: 8)
    # Micro-batches that a step's images are computed in, one after the other, to save memory.
    train.accumulation_steps = 1
    train.num_steps = 40_000  # (original: 40,000)
    train.log_steps = 50  # between two lines of the log
    train.eval_steps = 1000  # between two evaluations; the last step always evaluates
    train.checkpoint_steps = 1000  # between two checkpoints; the last step always saves
    # Project of Weights & Biases to log to as well; empty: none. Needs the extra `wandb`.
    train.wandb_project = ""
    train.max_skipped_steps = 20  # in a row, as not finite, after which a run stops
    # Evaluations without a better val mIoU after which a run ends early; 0: it never does.
    train.patience = 0
    train.keep_checkpoints = 2  # newest ones kept, besides the best by val mIoU

    config.parallel = parallel = ConfigDict()
    parallel.fsdp = False  # split parameters, optimiser state and EMA over the devices
    parallel.compilation_cache = ""  # folder of compiled programs; empty: one in the workdir

    config.eval = evaluate = ConfigDict()
    evaluate.batch_size = 8  # images per step, rounded up to a multiple of the devices
    evaluate.pad_multiple = 32  # image sides are padded to a multiple, to compile for few sizes
    # Factors by which an image is resized, whose logits are averaged (original, for test scores:
    # 0.5, 0.75 .. 2.0, with flip). Also for --mode=predict, as are the next three.
    evaluate.scales = (1.0,)
    evaluate.flip = False  # average over the mirror image too
    # Height and width of windows that slide over the image, whose logits are averaged; empty: none.
    evaluate.window = ()
    evaluate.overlap = 0.5  # share of a window that the next one sees too (original: 0)
    # Boundary IoU and F-score are computed within this share of the image's diagonal; 0: not at all
    # (Cheng et al., CVPR 2021: 0.02).
    evaluate.boundary_width = 0.0
    evaluate.num_pictures = 4  # images drawn beside label and prediction at an evaluation

    return replaced(config, VARIANTS[variant])
