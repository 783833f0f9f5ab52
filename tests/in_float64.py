"The launcher in float64, where sums in another order differ a billion times less than in float32."
import torch

from detr_nb import batching, criterion, train

torch.set_default_dtype(torch.float64)  # of weights
move = batching.Batch.to


def move_in_float64(batch: batching.Batch, device: torch.device) -> batching.Batch:
    "The batch on a device, its images and boxes in float64."
    batch = move(batch, device)
    boxes = batch.targets.boxes.double()
    return batch._replace(images=batch.images.double(), targets=batch.targets._replace(boxes=boxes))


batching.Batch.to = move_in_float64
criterion.SetCriterion.normalizers.__defaults__ = (torch.float64,)  # what the losses are divided by

if __name__ == "__main__":
    train.main()
