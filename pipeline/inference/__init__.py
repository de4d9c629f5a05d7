"""Using a tuned model: the Python API, what infer.py and demo.py run, and export.

from pipeline.inference import NeuralTuner

model = NeuralTuner.from_pretrained("runs/quickstart")
answer = model.reason("picture.jpg", "Which object is highest?")
print(answer.text, [(thing.phrase, thing.box, thing.score) for thing in answer.objects])
"""

from pipeline.inference.api import NeuralTuner
from pipeline.inference.results import Answer, Drawing, SegmentedObject

__all__ = ["Answer", "Drawing", "NeuralTuner", "SegmentedObject"]
