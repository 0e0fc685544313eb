"""Configurations as people write them for Triton, for tests that want real ones."""

# Written in the ways people write them: lists and repeats, braces and angles, colons or none, comments.
CONFIGS = {
    "an image classifier": """
        name: "resnet"
        platform: "onnxruntime_onnx"
        max_batch_size: 32
        input [
          {
            name: "data_0"
            data_type: TYPE_FP32
            format: FORMAT_NCHW
            dims: [ 3, 224, 224 ]
            reshape { shape: [ 1, 3, 224, 224 ] }
          }
        ]
        output [ { name: "prob_1" data_type: TYPE_FP32 dims: [ 1000 ] label_filename: "labels.txt" } ]
        dynamic_batching {
          preferred_batch_size: [ 4, 8 ]
          max_queue_delay_microseconds: 100
          default_queue_policy { timeout_action: REJECT default_timeout_microseconds: 5000 max_queue_size: 100 }
          priority_queue_policy { key: 1 value: { max_queue_size: 3 } }
        }
        instance_group [ { count: 2 kind: KIND_CPU }, { kind: KIND_GPU gpus: [ 0, 1 ] } ]
        version_policy: { specific: { versions: [ 1, 3 ] } }
    """,
    "a python model with parameters and warm-up": """
        # a comment
        backend: "python"
        input { name: "TEXT" data_type: TYPE_STRING dims: -1 }   # a repeat, not a list
        input { name: "MASK", data_type: TYPE_BOOL, dims: [ -1 ], optional: true };
        output < name: "OUT" data_type: TYPE_FP16 dims: 1 dims: 2 >
        parameters: { key: "EXECUTION_ENV_PATH", value: { string_value: "$$TRITON_MODEL_DIRECTORY/env.tar.gz" } }
        parameters [ { key: "execution" value { string_value: 'thr' "ead" } } ]
        model_warmup [ {
          name: "w" batch_size: 1
          inputs { key: "TEXT" value: { data_type: TYPE_STRING dims: [ 1 ] input_data_file: "text" } }
        } ]
        model_transaction_policy { decoupled: false }
    """,
    "a sequence model": """
        name: "seq" backend: "onnxruntime" max_batch_size: 8
        sequence_batching {
          max_sequence_idle_microseconds: 5000000
          oldest { max_candidate_sequences: 4 }
          control_input [
            { name: "START" control [ { kind: CONTROL_SEQUENCE_START fp32_false_true: [ 0, 1e0 ] } ] },
            { name: "CORRID" control [ { kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_UINT64 } ] }
          ]
          state [ { input_name: "i" output_name: "o" data_type: TYPE_FP32 dims: [ -1 ]
                    initial_state { name: "zero" data_type: TYPE_FP32 dims: [ 1 ] zero_data: true } } ]
        }
    """,
    "an ensemble": """
        platform: "ensemble"
        ensemble_scheduling { step [
          { model_name: "a" model_version: -1 input_map { key: "x" value: "IN" } output_map { key: "y" value: "t" } },
          { model_name: "b" model_version: -1 input_map { key: "x" value: "t" } output_map { key: "y" value: "OUT" } }
        ] }
    """,
    "nothing": "",
}
