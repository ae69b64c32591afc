"""The optimizers inside other people's training loops: three steps of a tiny GPT-2 on random tokens, no network."""

import os

import pytest
import torch

from orthlin.torch import LowRankMuon
from orthlin.torch.gpt2 import OptimizerFactory, param_groups

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

STEPS, BATCH, LENGTH, VOCABULARY = 3, 4, 8, 50
OPTIONS = {"lr": 0.02, "rank": 4, "momentum": 0.9}


def tiny_model(dtype=torch.float32):
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": LENGTH, "vocab_size": VOCABULARY}
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = transformers.GPT2Config(**sizes, **no_dropout, bos_token_id=None, eos_token_id=None)
    return transformers.GPT2LMHeadModel(config).to(dtype)


def examples():
    tokens = torch.randint(VOCABULARY, (STEPS * BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in tokens]


def batches(number=STEPS):
    return torch.utils.data.DataLoader(examples()[: number * BATCH], batch_size=BATCH)


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def tensors(optimizer):
    """Every tensor of the state by parameter number and name."""
    state = optimizer.state_dict()["state"]
    return {(i, key): x.clone() for i, entry in state.items() for key, x in entry.items() if torch.is_tensor(x)}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for key, x in expected.items():
        assert found[key].dtype == x.dtype, key
        assert torch.equal(found[key], x), key


def assert_trained(model):
    before = weights(tiny_model())
    assert not [name for name, p in weights(model).items() if torch.equal(p, before[name])]
    assert all(p.isfinite().all() for p in model.parameters())


def test_transformers_trainer(tmp_path):
    pytest.importorskip("accelerate", reason="the Trainer needs accelerate, which is not installed")

    def trained(folder, resume=None, optimizer="LowRankMuon", **options):
        trainer = transformers.Trainer(
            tiny_model(),
            transformers.TrainingArguments(
                str(tmp_path / folder),
                max_steps=STEPS,
                per_device_train_batch_size=BATCH,
                save_steps=2,
                use_cpu=True,
                report_to="none",
                disable_tqdm=True,
                dataloader_pin_memory=False,
            ),
            train_dataset=examples(),
            optimizer_cls_and_kwargs=(OptimizerFactory, {"optimizer": optimizer, "lr": 0.02, **options}),
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer.model, trainer.optimizer

    model, optimizer = trained("whole", rank=4)
    assert_trained(model)
    assert [group["algorithm"] for group in optimizer.param_groups] == ["orthogonal", "orthogonal", "adamw", "adamw"]
    resumed, second = trained("resumed", str(tmp_path / "whole" / "checkpoint-2"), rank=4)
    assert_same(weights(resumed), weights(model))
    assert_same(tensors(second), tensors(optimizer))
    assert_trained(trained("full", optimizer="Muon")[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accelerate_keeps_the_state_when_it_prepares_and_when_it_resumes(tmp_path, dtype):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    accelerator = accelerate.Accelerator(cpu=True)
    model = tiny_model(dtype)
    optimizer = LowRankMuon(param_groups(model), **OPTIONS)

    def step(model, optimizer, batch):
        accelerator.backward(model(**batch).loss)
        optimizer.step()
        optimizer.zero_grad()

    step(model, optimizer, next(iter(batches())))
    before = tensors(optimizer)
    counters = [group.get("step") for group in optimizer.param_groups]
    model, optimizer, loader = accelerator.prepare(model, optimizer, batches())
    assert_same(tensors(optimizer), before)
    assert [group.get("step") for group in optimizer.param_groups] == counters
    first, *rest = loader
    step(model, optimizer, first)
    accelerator.save_state(tmp_path / "state")

    def finish():
        for batch in rest:
            step(model, optimizer, batch)
        return weights(model), tensors(optimizer)

    once = finish()
    accelerator.load_state(tmp_path / "state")
    for found, expected in zip(finish(), once, strict=True):
        assert_same(found, expected)
    assert not any(torch.equal(p, weights(tiny_model(dtype))[name]) for name, p in once[0].items() if p.ndim > 1)


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # Lightning's use of torch
@pytest.mark.filterwarnings("ignore:.*does not have many workers")  # Lightning's advice
def test_lightning(tmp_path):
    lightning = pytest.importorskip("lightning", reason="lightning is not installed")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = tiny_model()

        def training_step(self, batch, _):
            return self.model(**batch).loss

        def configure_optimizers(self):
            return LowRankMuon(param_groups(self), **OPTIONS)

    def fitted(folder, resume=None, steps=STEPS):
        module = Module()
        trainer = lightning.Trainer(
            max_steps=steps,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            default_root_dir=tmp_path / folder,
        )
        trainer.fit(module, batches(1), ckpt_path=resume, weights_only=True if resume else None)
        trainer.save_checkpoint(tmp_path / f"{folder}.ckpt")
        return module.model, trainer.optimizers[0]

    model, optimizer = fitted("whole")
    assert_trained(model)
    fitted("part", steps=2)
    resumed, second = fitted("resumed", str(tmp_path / "part.ckpt"))
    assert_same(weights(resumed), weights(model))
    assert_same(tensors(second), tensors(optimizer))


class Small:
    """What Lightning's tuner and fine-tuning need of a module, for two layers."""

    def __init__(self, make):
        super().__init__()
        self.make, self.lr, self.batch_size = make, 0.01, 4
        self.backbone, self.head = torch.nn.Linear(6, 8), torch.nn.Linear(8, 3)

    def training_step(self, batch, _):
        return torch.nn.functional.cross_entropy(self.head(self.backbone(batch[0])), batch[1])

    def configure_optimizers(self):
        return self.make(self)

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(0)
        data = torch.randn(16, 6, generator=generator), torch.randint(3, (16,), generator=generator)
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data), batch_size=self.batch_size)


def lr_find(tuner, module, trainer, folder):
    tuner.Tuner(trainer("tuned")).lr_find(module(), num_training=8)


def scale_batch_size(tuner, module, trainer, folder):
    tuner.Tuner(trainer("scaled")).scale_batch_size(module(), max_trials=2)


def fine_tuned(tuner, module, trainer, folder):
    """A backbone that joins at epoch 1 as one group, and is resumed; not to the same weights, by AdamW neither."""
    from lightning.pytorch.callbacks import BackboneFinetuning, ModelCheckpoint

    whole = module()
    checkpoint = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    trainer("whole", callbacks=[BackboneFinetuning(1), checkpoint]).fit(whole)
    without = module()
    without.backbone.requires_grad_(False)
    assert len(whole.optimizers().param_groups) == len(without.configure_optimizers().param_groups) + 1
    resumed = module()
    trainer("resumed", callbacks=[BackboneFinetuning(1)]).fit(resumed, ckpt_path=str(folder / "epoch=1.ckpt"))
    first, second = (m.optimizers().state_dict() for m in (whole, resumed))
    assert [g["params"] for g in second["param_groups"]] == [g["params"] for g in first["param_groups"]]
    assert [g["step"] for g in second["param_groups"]] == [g["step"] for g in first["param_groups"]]
    assert [s.keys() for s in second["state"].values()] == [s.keys() for s in first["state"].values()]
    assert all(p.isfinite().all() for p in resumed.parameters())


@pytest.mark.filterwarnings("ignore")  # Lightning's advice, and its use of torch
@pytest.mark.parametrize("task", [lr_find, scale_batch_size, fine_tuned])
@pytest.mark.parametrize("routed", [True, False])
def test_tools_of_lightning(tmp_path, monkeypatch, task, routed):
    lightning = pytest.importorskip("lightning", reason="lightning is not installed")
    from lightning.pytorch import tuner

    monkeypatch.chdir(tmp_path)
    Module = type("Module", (Small, lightning.LightningModule), {})

    def made(model):
        free = [p for p in model.parameters() if p.requires_grad]
        return LowRankMuon(param_groups(model) if routed else free, lr=model.lr)

    def module():
        torch.manual_seed(0)
        return Module(made)

    def trainer(folder, **options):
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        return lightning.Trainer(
            default_root_dir=tmp_path / folder, accelerator="cpu", max_epochs=3, **quiet, **options
        )

    task(tuner, module, trainer, tmp_path)
