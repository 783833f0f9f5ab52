"What the chapters on transforms and batching cannot show alone: real processes, real workers, all sizes."
import pickle
from fractions import Fraction

import numpy as np
import pytest
import torch
from book_demos import spawn
from hypothesis import given, settings
from hypothesis import strategies as st

from detr_nb.batching import CachedDataset, EpochSampler, collate, make_loader
from detr_nb.coco import Sample, open_coco
from detr_nb.shapes_set import write_shapes
from detr_nb.transforms import laptop_transform, output_size, paper_transform


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_shapes(tmp_path_factory.mktemp("shapes"), num_train=40, num_val=9, seed=0, num_workers=1)


def read_epoch(process, root, batch_size, epoch, shuffle, num_workers=0, start_batch=0, cached=False):
    "Every picture that one process sees in an epoch, batch by batch: image id, pixels without padding, boxes."
    dataset = open_coco(root, "train", transform=laptop_transform(train=True), seed=7)
    dataset = CachedDataset(dataset) if cached else dataset
    rank, world_size = (0, 1) if process is None else (process.rank, process.world_size)
    loader = make_loader(dataset, batch_size, rank, world_size, seed=7, shuffle=shuffle, num_workers=num_workers)
    loader.batch_sampler.set_epoch(epoch, start_batch)
    seen = []
    for batch in loader:
        boxes = batch.targets.boxes.split(batch.targets.counts.tolist())
        rows = zip(batch.targets.image_ids.tolist(), batch.images, batch.targets.sizes.tolist(), boxes)
        seen.append([(i, image[:, :h, :w].numpy().tobytes(), box.numpy().tobytes()) for i, image, (h, w), box in rows])
    return seen


def test_two_processes_see_the_halves_of_the_one_process_batches_pixel_by_pixel(root):
    alone = read_epoch(None, root, 8, 2, True)
    first, second = spawn(read_epoch, 2, root, 4, 2, True)
    assert len(alone) == len(first) == len(second) == 5
    assert [a + b for a, b in zip(first, second)] == alone


def test_two_processes_evaluate_each_image_once(root):
    parts = spawn(read_epoch, 2, root, 3, 0, False)
    ids = sorted(i for part in parts for batch in part for i, _, _ in batch)
    assert ids == sorted(open_coco(root, "train").image_ids.tolist())


@pytest.mark.parametrize("changed", [{"num_workers": 2}, {"cached": True}, {"num_workers": 1, "cached": True}])
def test_workers_and_cache_change_no_bit(root, changed):
    assert read_epoch(None, root, 8, 3, True, **changed) == read_epoch(None, root, 8, 3, True)


def test_a_resumed_epoch_goes_on_with_the_same_pictures(root):
    assert read_epoch(None, root, 8, 1, True, start_batch=3) == read_epoch(None, root, 8, 1, True)[3:]


def test_epochs_differ_in_order_and_in_pictures(root):
    first, second = (sum(read_epoch(None, root, 8, epoch, True), []) for epoch in (0, 1))
    assert [row[0] for row in first] != [row[0] for row in second]
    assert {row[0] for row in first} == {row[0] for row in second}
    assert len({row[1] for row in first} & {row[1] for row in second}) < len(first)


def test_persistent_workers_follow_the_epoch(root):
    dataset = open_coco(root, "train", transform=laptop_transform(train=True), seed=7)
    loader = make_loader(dataset, 8, seed=7, num_workers=1)
    for epoch in range(3):
        loader.batch_sampler.set_epoch(epoch)
        ids = [batch.targets.image_ids.tolist() for batch in loader]
        assert ids == [[row[0] for row in batch] for batch in read_epoch(None, root, 8, epoch, True)]


def test_the_loader_leaves_the_global_generator_alone(root):
    state = torch.get_rng_state()
    next(iter(make_loader(open_coco(root, "train"), 4)))
    assert torch.equal(torch.get_rng_state(), state)


def test_grouping_by_shape_pads_less_and_loses_no_image(root):
    dataset = open_coco(root, "train")
    canvas = {}
    for grouped in (False, True):
        batches = list(make_loader(dataset, 5, seed=1, group_by_shape=grouped))
        assert sorted(torch.cat([b.targets.image_ids for b in batches]).tolist()) == sorted(dataset.image_ids.tolist())
        canvas[grouped] = sum(b.images.numel() for b in batches)
    assert canvas[True] < 0.9 * canvas[False]


sizes = st.integers(1, 120)


@given(size=sizes, batch_size=st.integers(1, 9), world_size=st.integers(1, 7), seed=st.integers(0, 2**32 - 1),
       start=st.integers(0, 5), alike=st.booleans())
@settings(max_examples=200)
def test_evaluation_counts_each_image_once(size, batch_size, world_size, seed, start, alike):
    aspects = np.random.default_rng(seed).random(size) if alike else None
    shared = {"world_size": world_size, "seed": seed, "shuffle": False, "aspects": aspects}
    samplers = [EpochSampler(size, batch_size, rank, **shared) for rank in range(world_size)]
    batches = [list(s) for s in samplers]
    assert sorted(index for rank in batches for batch in rank for _, index in batch) == list(range(size))
    assert all(0 < len(batch) <= batch_size for rank in batches for batch in rank)
    for sampler, rank in zip(samplers, batches):
        assert len(sampler) == len(rank)
        sampler.set_epoch(0, start)
        assert list(sampler) == rank[start:] and len(sampler) == len(rank[start:])


@given(size=sizes, batch_size=st.integers(1, 9), world_size=st.integers(1, 7), epoch=st.integers(0, 300),
       alike=st.booleans())
@settings(max_examples=200)
def test_training_splits_the_batches_of_one_process_evenly(size, batch_size, world_size, epoch, alike):
    aspects = np.random.default_rng(size).random(size) if alike else None
    samplers = [EpochSampler(size, batch_size, r, world_size, seed=3, aspects=aspects) for r in range(world_size)]
    alone = EpochSampler(size, batch_size * world_size, seed=3, aspects=aspects)
    for sampler in [*samplers, alone]:
        sampler.set_epoch(epoch)
    ranks = [list(sampler) for sampler in samplers]
    assert len({len(rank) for rank in ranks}) == 1 and all(len(s) == len(rank) for s, rank in zip(samplers, ranks))
    joined = [sum(parts, []) for parts in zip(*ranks)]
    if size >= world_size:  # fewer samples than processes: some are repeated, so that nobody has none
        assert joined == list(alone)
        shown = [index for batch in joined for _, index in batch]
        assert len(shown) == len(set(shown)) == (size // (batch_size * world_size) * batch_size * world_size or size)
    assert all(rank and all(rank) for rank in ranks)
    assert max(len(rank[0]) for rank in ranks) - min(len(rank[0]) for rank in ranks) <= 1


@pytest.mark.parametrize("wrong", [{"size": 0}, {"batch_size": 0}, {"rank": 2}, {"rank": -1}])
def test_an_impossible_split_is_refused_with_its_numbers(wrong):
    with pytest.raises(ValueError, match="EpochSampler cannot split"):
        EpochSampler(**{"size": 5, "batch_size": 2, "rank": 0, "world_size": 2} | wrong)


@given(height=st.integers(1, 5000), width=st.integers(1, 5000), short=st.integers(1, 1400),
       longest=st.none() | st.integers(1, 1400))
@settings(max_examples=500)
def test_output_size_is_the_released_rule_in_exact_fractions(height, width, short, longest):
    wanted = Fraction(short)
    if longest is not None and Fraction(max(height, width), min(height, width)) * short > longest:
        wanted = Fraction(round(Fraction(longest * min(height, width), max(height, width))))
    scale = wanted / min(height, width)
    slow = (height, width) if scale == 1 else (int(height * scale), int(width * scale))
    ours = output_size(height, width, short, longest)
    assert ours == slow or (min(slow) == 0 and sorted(ours) == [1, longest])


@given(height=st.integers(1, 300), width=st.integers(1, 300), count=st.integers(0, 4), seed=st.integers(0, 2**31))
@settings(max_examples=60)
def test_any_image_through_any_recipe_becomes_a_sound_batch(height, width, count, seed):
    rng = np.random.default_rng(seed)
    corner = rng.uniform(0, 1, (count, 2)) * [width - 0.5, height - 0.5]
    far = corner + rng.uniform(0.01, 1, (count, 2)) * ([width, height] - corner)
    boxes = torch.tensor(np.concatenate([corner, far], 1), dtype=torch.float32)
    image = torch.from_numpy(rng.integers(0, 256, (3, height, width), dtype=np.uint8))
    sample = Sample(image, torch.arange(count), boxes, 1, (height, width))
    recipes = [paper_transform(True, scale=0.2), paper_transform(False, scale=0.2), laptop_transform(True),
               laptop_transform(True, short_side=96, max_size=128)]
    batch = collate([recipe(sample, np.random.default_rng(seed)) for recipe in recipes])
    targets = batch.targets
    assert targets.counts.sum() == len(targets.boxes) == len(targets.labels)
    assert (targets.boxes >= 0).all() and (targets.boxes[:, :2] + targets.boxes[:, 2:] / 2 <= 1 + 1e-5).all()
    assert torch.isfinite(batch.images).all()
    padding = [None] * 4 if batch.padding is None else batch.padding
    for picture, (h, w), padded in zip(batch.images, targets.sizes.tolist(), padding):
        assert padded is None or (padded.sum() == padded.numel() - h * w and not picture[:, padded].any())


def test_batches_and_cached_sets_survive_pickling(root):
    cached = CachedDataset(open_coco(root, "val", transform=laptop_transform(train=True)))
    batch = collate([cached[i] for i in range(4)])
    copied = pickle.loads(pickle.dumps((cached, batch)))
    assert torch.equal(copied[1].images, batch.images) and torch.equal(copied[0][(2, 1)].image, cached[(2, 1)].image)
    assert copied[0].subset([3]).image_ids.tolist() == [cached.image_ids[3].item()]
    plain = open_coco(root, "val", transform=laptop_transform(train=True))
    assert torch.equal(cached.subset([3])[0].boxes, plain.subset([3])[0].boxes)


def test_a_batch_moves_as_a_whole():
    image, box = torch.zeros(3, 4, 6, dtype=torch.uint8), torch.tensor([[0.0, 0, 6, 4]])
    sample = Sample(image, torch.tensor([1]), box, 9, (4, 6))
    moved = collate([sample, sample]).to("meta")
    assert moved.padding is None and moved.targets.masks is None
    assert all(x.device.type == "meta" for x in (moved.images, *moved.targets[:6]))
