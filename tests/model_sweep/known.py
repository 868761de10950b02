"""Classes that the sweep finds neither equal nor run with eager, each with its reason. A class that leaves its line here fails
the sweep's test, and so does one that joins without one."""

_BOOLEAN = (
    "Transformers' default",
    "eager adds the boolean mask of the text encoder to its scores, as 0 and 1; under our name, as under Transformers' default, it hides",
)  # fmt: skip
_INVERTED = (
    "as sdpa", "the layer negates its mask as if it were boolean, and so hides under eager's additive one what it should show"
)  # fmt: skip
_UNSEEN = (
    "as sdpa",
    "a row that sees no key is 0 here and under SDPA, the mean of V in eager; the model's next layers mix rows",
)
_PADDING = ("DIFFERS", "the outputs that differ are read off a padding row, which is 0 here and sees keys in eager")

# class name -> (a part of the reason that the sweep gives, why it stands)
KNOWN: dict[str, tuple[str, str]] = {
    **dict.fromkeys(
        (
            "GroundingDinoForObjectDetection", "GroundingDinoModel", "MMGroundingDinoForObjectDetection", "MMGroundingDinoModel",
        ),
        _BOOLEAN,
    ),
    **dict.fromkeys(("Nemotron3_5AsrForRNNT", "NemotronAsrStreamingForRNNT", "NemotronAsrStreamingEncoder"), _INVERTED),
    **dict.fromkeys(("RecurrentGemmaForCausalLM", "SeamlessM4Tv2ForSpeechToText"), _UNSEEN),
    **dict.fromkeys(
        (
            "ModernVBertForSequenceClassification", "UltraVBertForSequenceClassification", "PeAudioModel",
            "T5GemmaForSequenceClassification", "MusicgenMelodyForConditionalGeneration",
        ),
        _PADDING,
    ),
    "DoryForCausalLM": ("generate", "its loops amplify rounding: eager in float64 is as far from eager"),
}  # fmt: skip
