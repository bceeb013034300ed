"""What one version of transformers wrote, the other reads the same; needs both environments."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from trt_kd.checkpoints import load_model
from trt_kd.exporters.comparison import logits_of
from trt_kd.exporters.hf_unified_reader import read_model

ROOT = Path(__file__).parents[2]
OTHER = os.environ.get("TRT_KD_OTHER_PYTHON") and str(ROOT / os.environ["TRT_KD_OTHER_PYTHON"])
FORMATS = {"fp8": "fp8", "int4_awq": {"kind": "int4_awq", "block_size": 64}}
MIXTURES = ("mixtral", "qwen3_moe")
SCRIPT = """
import json, sys
from pathlib import Path
import numpy as np, torch, transformers
from trt_kd.artifacts import Artifact, writing
from trt_kd.checkpoints import save_model
from trt_kd.config import StageConfig
from trt_kd.exporters.comparison import logits_of
from trt_kd.exporters.hf_unified_reader import read_model
from trt_kd.stages.export import ExportConfig, export
from trt_kd.stages.quantize import QuantizeConfig, quantize

class Made(StageConfig):
    stage = "import"

root, tokenizer, text, formats = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4]
blocks = np.load(root / "blocks.npy")
data = {"source": {"kind": "text", "files": [text]}, "block_tokens": 32}

def save(model, name):
    with writing(root / name, kind="checkpoint", config=Made(), inputs={}) as draft:
        save_model(model, draft.path, tokenizer_from=tokenizer)
    np.save(root / f"{name}.npy", np.concatenate(list(logits_of(model, blocks))))
    return Artifact.open(root / name)

def through(source, name, chosen):
    given = {"format": chosen, "data": data, "calibration_tokens": 64, "heldout_blocks": 1}
    made = quantize(QuantizeConfig.model_validate(given), source=source, out=root / f"q-{name}")
    given = {"lane": "hf-unified", "data": data, "verify_blocks": 1}
    export(ExportConfig.model_validate(given), source=made, out=root / name)
    logits = np.concatenate(list(logits_of(read_model(root / name), blocks)))
    np.save(root / f"{name}.npy", logits)

torch.manual_seed(0)
rope = {"rope_type": "default", "rope_theta": 100000.0}
new = int(transformers.__version__.split(".")[0]) >= 5
model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
    vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16, initializer_range=0.15,
    tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, max_position_embeddings=512,
    **({"rope_parameters": rope} if new else {"rope_theta": 100000.0}))).eval()
source = save(model, "plain")
for name, chosen in json.loads(formats).items():
    through(source, name, chosen)
for name in sys.argv[5:]:
    config = transformers.AutoConfig.for_model(
        name, vocab_size=512, hidden_size=64, intermediate_size=64, moe_intermediate_size=32,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        num_experts_per_tok=2, initializer_range=0.15, max_position_embeddings=512,
        **{"num_local_experts" if name == "mixtral" else "num_experts": 4})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    through(save(model, f"plain-{name}"), name, "fp8")
print(transformers.__version__)
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory, tokenizer_dir, text_file):
    """Folder with what the other environment made, and the tokens its logits are of."""
    if not OTHER:
        pytest.skip("TRT_KD_OTHER_PYTHON names no Python of the other transformers; make test does")
    import transformers

    root = tmp_path_factory.mktemp("elsewhere")
    np.save(root / "blocks.npy", np.random.default_rng(3).integers(1, 512, (2, 32)))
    arguments = [root, tokenizer_dir, text_file, json.dumps(FORMATS), *MIXTURES]
    done = subprocess.run(
        [OTHER, "-c", SCRIPT, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    there = done.stdout.split()[-1]
    assert there.split(".")[0] != transformers.__version__.split(".")[0], there
    return root


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FORMATS, *MIXTURES])
def test_a_model_quantized_and_exported_elsewhere_has_the_same_logits_here(made, name):
    expected = np.load(made / f"{name}.npy")
    found = np.concatenate(list(logits_of(read_model(made / name), np.load(made / "blocks.npy"))))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    plain = f"plain-{name}.npy" if name in MIXTURES else "plain.npy"
    assert np.abs(expected - np.load(made / plain)).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", *(f"plain-{name}" for name in MIXTURES)])
def test_a_checkpoint_saved_elsewhere_has_the_same_logits_here(made, name):
    blocks = np.load(made / "blocks.npy")
    found = np.concatenate(list(logits_of(load_model(made / name), blocks)))
    np.testing.assert_allclose(found, np.load(made / f"{name}.npy"), rtol=1e-4, atol=1e-5)


def test_the_environment_names_a_python_that_is_there():
    if not OTHER:
        pytest.skip("TRT_KD_OTHER_PYTHON is not set")
    assert Path(OTHER).is_file()
    assert Path(OTHER) != Path(sys.executable)
