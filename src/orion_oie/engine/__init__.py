"""The orchestrator: the public calls, and the pipeline of a request.

For other packages: engine (`OrionInferenceEngine`), handle (`RequestHandle`), answer_stream
(`AnswerStream`), chat (`Chat`), text_streamer (`stream_text`), lifecycle (`RequestState`),
streaming (splitters for `chunk_by`).

A request passes through pipeline, scheduling, chain and streaming; request has the types of its
stages. build creates the parts of an engine; among these are agents (personas), breaker, loading,
planner, stand_ins (answers of other models), residents (models loaded by hand), and observer and
watchdog (statistics and health).
"""
