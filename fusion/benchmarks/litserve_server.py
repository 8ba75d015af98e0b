"""LitServe with a model of fusion, as its documentation recommends for throughput: batches, a worker for each core, the fast queue."""

import json
import sys
from typing import Any

import litserve
from starlette.requests import Request

from fusion.deploy.serve.control import ready
from fusion.deploy.serve.limits import Limits
from fusion.deploy.serve.model import load
from fusion.deploy.serve.requests import checked_values

WAIT_S = 0.005


class Answering(litserve.LitAPI):
    """Reads, preprocesses and answers by the same code as fusion serve, so that the servers alone differ."""

    def __init__(self, path: str, threads: int, batch_size: int) -> None:
        super().__init__(max_batch_size=batch_size, batch_timeout=WAIT_S)
        self.path, self.threads, self.largest = path, threads, batch_size

    def setup(self, device: str) -> None:
        self.version = ready(self.path, lambda path: load(path, threads=self.threads, max_megapixels=100.0), self.largest)

    def decode_request(self, request: Request, **_: Any) -> Any:  # of which LitServe passes the JSON
        return self.version.row(checked_values(dict(request), self.version.inputs, Limits()))

    def batch(self, inputs: list[Any]) -> list[Any]:
        return inputs

    def predict(self, rows: Any, **_: Any) -> Any:
        inputs = {name: one.concat([row.inputs[name] for row in rows]) for name, one in self.version.inputs.items()}
        return self.version.model.gather([self.version.model.run(inputs)])

    def unbatch(self, output: Any) -> list[Any]:
        return list(zip(output.answers, output.values.tolist(), [output.names] * len(output.answers), strict=True))

    def encode_response(self, output: Any, **_: Any) -> dict[str, Any]:
        answer, values, names = output
        return {"answer": answer, "probabilities": dict(zip(names, values, strict=False)), "version": self.version.name}


def main() -> None:
    """Reads path, port, batch size, workers and threads from its argument, as JSON."""
    path, port, batch_size, workers, threads = json.loads(sys.argv[1])
    api = Answering(path, threads, batch_size)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=workers, timeout=600, fast_queue=True)
    server.run(host="127.0.0.1", port=port, num_api_servers=1, log_level="warning", generate_client_file=False)


if __name__ == "__main__":
    main()
