"""Train a method in plain PyTorch.

    python lightly_ext/examples/plain_pytorch.py --steps 200

Needed: pip install ".[lightly]", in a clone of ssl-plugins. The images are scikit-learn's digits unless
--data names a folder.
"""

import torch
from lightly.utils.scheduler import cosine_schedule

from lightly_ext.examples import common
from plugins.tools.command import exit_on_user_error

METHOD = "isoloss"


def main(given: list[str] | None = None) -> None:
    """Train, and print the kNN accuracy of the untrained and of the trained backbone."""
    args = common.arguments("Train a method in plain PyTorch.", METHOD, given)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = common.build(args.method).to(device)
    optimizer = common.optimizer(args.method, model.training_parameters())
    loader = common.views(args.data)
    model.allocate(len(common.dataset(args.data / "train")))  # of the images, if the method remembers them
    print(f"kNN untrained: {common.knn(model, args.data):.2f}")

    epoch = step = 0
    while step < args.steps:
        model.start_epoch(epoch, loader, optimizer)
        for views, _, index in loader:
            loss = model.loss([view.to(device) for view in views], index)
            loss.backward()
            model.after_backward()  # freezes parameters, if the method does so
            optimizer.step()
            optimizer.zero_grad()
            model.update_momentum(cosine_schedule(step, args.steps, 0.99, 1))  # does nothing without a teacher
            step += 1
            if step % 20 == 0 or step == args.steps:
                print(f"step {step}: loss {loss.item():.4f}")
            if step == args.steps:
                break
        epoch += 1

    print(f"kNN trained: {common.knn(model, args.data):.2f}")


if __name__ == "__main__":
    with exit_on_user_error():
        main()
