"""Learning happens: all parts together, on two pictures of the embedded set, bring the loss down."""
import torch

from detr_nb.batching import collate
from detr_nb.coco import open_coco
from detr_nb.criterion import SetCriterion
from detr_nb.detr import build_detr
from detr_nb.shapes_set import write_shapes
from detr_nb.transforms import laptop_transform


def test_sixty_steps_on_two_pictures_halve_the_loss(tmp_path):
    torch.manual_seed(0)
    root = write_shapes(tmp_path / "shapes", num_train=2, num_val=1, num_workers=1)
    dataset = open_coco(root, "train", transform=laptop_transform(train=False))
    batch = collate([dataset[0], dataset[1]])
    model = build_detr(10, "small", hidden_dim=64, nheads=4, enc_layers=1, dec_layers=2, dim_feedforward=128,
                       num_queries=20, dropout=0.0, temperature=20.0, pre_norm=True)
    criterion, optimizer = SetCriterion(model.num_classes), torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(60):
        loss = criterion.total(criterion(model(batch.images, batch.padding), batch.targets))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2, losses[::10]
