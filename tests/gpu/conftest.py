"""The bundled model, as for the tests on a CPU."""

from tests.vllm.conftest import model_path as model_path
