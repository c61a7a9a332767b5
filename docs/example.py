"""The whole idea in one file, on digits: train a teacher, search its boundary, distil students with and without it.

The pipeline does the same with shards in the place of tensors. Run: python docs/example.py
"""

from statistics import fmean, stdev

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import pipeline as bd

EPOCHS, BATCH, SEEDS, TEMPERATURE = 40, 32, 10, 3.0
torch.set_num_threads(1)  # tensors are small

digits = load_digits()
bytes_ = torch.from_numpy(digits.images * 255 / 16).round().byte()[:, None]  # (1797, 1, 8, 8)
images, labels = bd.pixels(bytes_), torch.from_numpy(digits.target)
order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
known, train, test = order[:1000], order[:100], order[1000:]  # the teacher has seen more than its students will


def original(network, rows, progress):
    return F.cross_entropy(network(images[rows]), labels[rows])


def train_network(units, rows, seed, loss_of=original):
    """Train a small network, from pixels in [0, 1] to logits, by stochastic gradient descent on a loss of rows."""
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, units), nn.ReLU(), nn.Linear(units, 10))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.03, momentum=0.9)
    for epoch in range(EPOCHS):
        for batch in rows[torch.randperm(len(rows))].split(BATCH):
            optimizer.zero_grad()
            loss_of(network, batch, epoch / EPOCHS).backward()
            optimizer.step()
    return network.eval()


def accuracy(network):
    return 100 * float((network(images[test]).argmax(1) == labels[test]).float().mean())


# 1. A teacher.
teacher = train_network(256, known, seed=0)
print(f"teacher: {accuracy(teacher):.1f} %")

# 2. Near each image, a sample on the boundary between the teacher's class and its runner-up; once, for all students.
found = bd.find_boundary(teacher, images)
samples = {
    "image": bytes_,
    "label": labels,
    "teacher_logits": teacher(images).detach(),
    "samples": (images + found.perturbation)[:, None],  # one target class each
    "boundary_logits": found.boundary_logits[:, None],
    "status": found.status[:, None],
}
print(f"on the boundary: {(found.status == bd.Status.CONVERGED).float().mean():.1%} of {len(images)} searches")


def hinton(network, rows, progress):
    """Learn from the teacher's logits on the images, too."""
    logits = network(images[rows])
    distilled = bd.softened_cross_entropy(logits, samples["teacher_logits"][rows], TEMPERATURE).mean()
    return F.cross_entropy(logits, labels[rows]) + (4 - 3 * progress) * distilled


def bss(network, rows, progress):
    """Learn from the teacher's logits on boundary samples, too, for three quarters of the training."""
    batch = {name: column[rows] for name, column in samples.items()}
    loss = bd.BoundaryLoss(TEMPERATURE)(network, network(images[rows]), batch)
    return hinton(network, rows, progress) + max(0, 2 * (1 - progress / 0.75)) * loss


# 3. Students, compared.
for method in (original, hinton, bss):
    correct = [accuracy(train_network(16, train, seed, method)) for seed in range(SEEDS)]
    print(f"{method.__name__}: {fmean(correct):.1f} ± {stdev(correct):.1f} %, n = {SEEDS}")
