"""The house keeps its order: each module imports only what stands to its left."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# From left to right; modules in one entry do not know each other.
ORDER = (
    {"host_memory"},
    {
        "config",
        "xla",
        "schedulers",
        "noise",
        "noise_file",
        "files",
        "ffmpeg",
        "tokenizer",
        "images",
        "fitting",
        "conditioning",
        "hosts",
        "apart",
        "fp8",
    },
    {"sharding", "labels", "shipped"},
    {"media", "plans", "columns", "tiles"},
    {"layers"},
    {"rope", "cudnn", "vae_stages", "parts", "partials", "stack"},
    {"hopper", "hopper_norm", "ulysses"},
    {"hopper_parts", "residual"},
    {"attention"},
    {"vae_blocks", "patches", "sequence", "image_tokens"},
    {"dit", "vae", "umt5", "clip"},
    {"spread"},
    {"tile_programs"},
    {"vae_tiles"},
    {"sampler"},
    {
        "weights.rules",
        "weights.trees",
        "weights.folders",
        "weights.hashes",
        "weights.quantization",
    },
    {"weights.facts", "weights.pickled"},
    {"weights.archive", "weights.readers"},
    {
        "weights.pth",
        "weights.dit",
        "weights.vae",
        "weights.umt5",
        "weights.clip",
    },
    {"weights.repacks", "weights.lora_names"},
    {"weights.layouts"},
    {"weights.sources"},
    {
        "weights.checkpoint",
        "weights.remote",
        "weights.descriptions",
        "weights.writers",
        "weights.lora",
    },
    {"weights.export", "weights.miniature", "weights.lora_files", "weights.derived"},
    {"weights.adapters"},
    {"request", "streaming"},
    {"planning.vae_memory", "planning.costs", "progress"},
    {"planning.memory"},
    {"planning.budget", "loaders"},
    {"pipeline", "planning.targets"},
    {"loading", "planning.programs", "planning.vae_costs"},
    {"planning.needs"},
    {"planning.estimate"},
    {"planning.changes"},
    {"__init__", "converter"},
    {"training.dataset", "training.entries"},
    {"training.batches", "training.cache"},
    {"cli"},
    {"resume", "machine", "outputs", "prompts"},
    {"tasks"},
    {"jobs", "devices"},
    {"runner", "planning.command"},
    {"training.optimizer", "training.metrics", "training.flow", "training.lora"},
    {"training.step"},
    {"training.saving"},
    {"training.loop", "training.finetune"},
    {"training.config"},
    {"training.samples", "training.results"},
    {"training.command"},
    {"training.__main__"},
    {"training.miniature.world"},
    {
        "training.miniature.render",
        "training.miniature.captions",
        "training.miniature.judge",
        "training.miniature.files",
        "training.miniature.whole",
    },
    {"training.miniature.networks", "training.miniature.running"},
    {"training.miniature.autoencoder", "training.miniature.text", "training.miniature.reader"},
    {"training.miniature.pool"},
    {"training.miniature.transformer"},
    {"training.miniature.evaluate", "training.miniature.pack", "training.miniature.examples"},
    {"training.miniature.__main__"},
)
MARKERS = {f"{name}.__init__" for name in ("planning", "weights", "training", "training.miniature")}
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}
BANNED = {"torch", "diffusers", "transformers", "benchmarks", "convert", "tests"}
TOP = {
    "wan_jax", "convert", "configs", "run_t2v.py", "run_i2v.py", "tests", "setup.py", "README.md",
    "LICENSE", "NOTICE", "CHANGELOG.md", "pyproject.toml", "benchmarks", "docs", ".ci",
    ".gitignore",
}  # fmt: skip


def imported(source: str) -> set[str]:
    """Dotted names that a module's source imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            base = node.module or ""
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return names


def violations(name: str, source: str) -> list[str]:
    """What in the source of module `name` (under wan_jax) breaks the order."""
    found = [f"{name} imports {n}" for n in imported(source) if n.split(".")[0] in BANNED]
    if "wan_jax" in imported(source) and RANK[name] <= RANK["__init__"]:
        members = {n for n in imported(source) if n.startswith("wan_jax.")}
        if not members:
            found.append(f"{name} imports the package's face")
    for target in imported(source):
        inner = target.removeprefix("wan_jax.")
        if inner in RANK and target != inner and RANK[inner] >= RANK[name]:
            found.append(f"{name} imports {inner}, which does not stand to its left")
    return found


def _modules() -> dict[str, str]:
    package = ROOT / "wan_jax"
    return {
        ".".join(path.relative_to(package).with_suffix("").parts): path.read_text()
        for path in package.rglob("*.py")
    }


def test_every_module_imports_to_its_left() -> None:
    modules = _modules()
    unknown = set(modules) - set(RANK) - MARKERS
    assert not unknown, f"give these a place in ORDER: {unknown}"
    assert not [v for name in RANK.keys() & modules for v in violations(name, modules[name])]


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("dit", "from wan_jax.pipeline import Wan"),
        ("rope", "import wan_jax.attention"),
        ("layers", "def f():\n    from wan_jax import cli"),
        ("sampler", "import torch.nn"),
        ("config", "import wan_jax"),
        ("weights.rules", "from wan_jax.weights import dit"),
    ],
)
def test_a_wrong_import_is_found(name: str, source: str) -> None:
    assert violations(name, source)


def test_right_imports_pass() -> None:
    assert not violations(
        "dit", "import jax\nfrom wan_jax import rope\nfrom wan_jax.layers import x"
    )


def test_package_markers_are_empty() -> None:
    modules = _modules()
    assert not [name for name in MARKERS if modules[name].strip()]


def test_files_and_functions_keep_their_size() -> None:
    long = []
    for name, source in _modules().items():
        if source.count("\n") > 400:
            long.append(f"{name}: {source.count(chr(10))} lines")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno > 60:
                long.append(f"{name}.{node.name}")
    assert not long


def test_scripts_are_thin() -> None:
    for script in ROOT.glob("run_*.py"):
        assert script.read_text().count("\n") < 120


def test_nothing_else_lies_at_the_top() -> None:
    import subprocess

    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split()
    if not listed:
        pytest.skip("not a git checkout")
    assert {path.split("/")[0] for path in listed} <= TOP
