// Every public name of limbeck, listed by hand.

// Tokenizers and data
export type { Conversation, ConversationFormat } from './data/conversations.ts';
export {
  type Dataset,
  type DatasetOptions,
  type DatasetReport,
  type DatasetState,
  type Loader,
  openDataset,
} from './data/dataset.ts';
export type { Mask } from './data/examples.ts';
export { type InstructionOptions, type InstructionReport, type Instructions, openInstructions } from './data/instructions.ts';
export { type JsonlOptions, jsonl } from './data/jsonl.ts';
export type { Mixture, MixtureSource, SourceGiven, SourceReport } from './data/mixture.ts';
export { type Batch, type Layout, packDocuments } from './data/pack.ts';
export { shuffled } from './data/shuffle.ts';
export { type Source, type TextFilesOptions, type TextSource, type TokenSource, textFiles, texts } from './data/source.ts';
export { openTokenFile, type TokenFile, type TokenFileOptions, tokenFile, writeTokenFile } from './data/tokens.ts';
// Training, distillation, evaluation
export { distill } from './distill/distill.ts';
export { cacheTeacher, type TaughtCache, type TeachOptions } from './distill/teach.ts';
export { type ComparisonOptions, type EvaluateOptions, evaluate, evaluateModel } from './evaluate/evaluate.ts';
export type { GgmlTypeName } from './io/ggml.ts';
// Files
export {
  type Gguf,
  type GgufWriteOptions,
  openGguf,
  writeGguf,
} from './io/gguf.ts';
export type { GgufEntry, GgufHeader, GgufInput, GgufMetadata, GgufValue } from './io/gguf-header.ts';
export {
  type OnnxGraph,
  type OnnxNode,
  type OnnxOptions,
  type OnnxTensor,
  type OnnxType,
  type OnnxValue,
  writeOnnx,
} from './io/onnx.ts';
export { openSafetensors, type Safetensors, writeSafetensors } from './io/safetensors.ts';
export { type LoadAdapterOptions, loadAdapter, type SaveAdapterOptions, saveAdapter } from './models/adapter.ts';
export { attend, type CacheRows, type Context, cacheRows, createCache, type KeyValueCache } from './models/cache.ts';
export {
  type CompleteOptions,
  complete,
  completions,
  type GenerateOptions,
  type Generator,
  generate,
  generateText,
  loadGenerator,
  type Prompt,
  streamText,
  type TextCompletion,
  type TextOptions,
  type TextPiece,
  type TextToken,
} from './models/completion.ts';
export {
  type BaseConfig,
  type ForwardOptions,
  type LayerKind,
  layerKind,
  layerWindow,
  type ModelInput,
} from './models/config.ts';
export {
  type DecoderConfig,
  type DecoderParameters,
  decoderArchitectures,
  decoderHidden,
  decoderSpec,
} from './models/decoder.ts';
export { type GenerationConfig, loadGenerationConfig } from './models/defaults.ts';
export { latestCheckpoint, resolveCheckpoint } from './models/folder.ts';
export {
  type BatchOptions,
  type FinishReason,
  type GenerationEvent,
  generateTokens,
  type TokenLogProb,
  type TokenOptions,
  type TokenRequest,
} from './models/generate.ts';
export { type ExportGgufOptions, exportGguf, type GgufModel, type GgufType, ggufTypes, openGgufModel } from './models/gguf.ts';
export { exportGgufAdapter } from './models/gguf-adapter.ts';
export { type Gpt2Config, type Gpt2Parameters, gpt2Hidden, gpt2Spec } from './models/gpt2.ts';
export {
  createModel,
  type LanguageModel,
  type LoadedModel,
  type LoadOptions,
  loadConfig,
  loadModel,
  loadWeights,
  type ModelChanges,
  type ModelConfig,
  modelConfig,
  type SaveOptions,
  saveModel,
} from './models/model.ts';
export { exportOnnx, type OnnxExportOptions } from './models/onnx.ts';
export { createPrefixCache, type PrefixCache } from './models/prefix.ts';
export { type Preset, presets } from './models/presets.ts';
export { architectureNames, modelSpec } from './models/registry.ts';
export type { SamplingOptions } from './models/sampling.ts';
export { type ScoreRequest, scoreTokens } from './models/score.ts';
export {
  type Adaptable,
  type Adapter,
  type AdapterOptions,
  createAdapter,
  mergeAdapter,
  setAdapter,
  unmergeAdapter,
  withAdapter,
  withDropout,
} from './nn/lora.ts';
// Parameters and models
export {
  countParameters,
  createParameters,
  matrix,
  type NamedParameter,
  type ParameterOptions,
  type ParameterSpec,
  type Parameters,
  type SpecTree,
  type Tensors,
  vector,
  type WeightSpec,
  weight,
} from './nn/parameters.ts';
// Ops
export { geglu, gelu, silu, swiglu } from './ops/activation.ts';
export { type AttentionOptions, type AttentionStepOptions, attention, attentionStep } from './ops/attention.ts';
export type { Divergence } from './ops/divergence.ts';
export { add, add_, cast, copy, copy_, fill_, mul, scale, softcap, sub } from './ops/elementwise.ts';
export { type EmbeddingOptions, embedding } from './ops/embedding.ts';
export { type GatedLinearOptions, gatedLinear, linear } from './ops/linear.ts';
export {
  type CrossEntropy,
  type CrossEntropyOptions,
  type Distillation,
  type DistillOptions,
  linearCrossEntropy,
  linearDistill,
  type TeacherOutput,
} from './ops/loss.ts';
export { layerNorm, type RmsNormAddOptions, type RmsNormOptions, rmsNorm, rmsNormAdd } from './ops/norm.ts';
export { type AdamWOptions, type AdamWState, adamw_, type Moment8 } from './ops/optimizer.ts';
export {
  type AdaptedWeight,
  type BlockWeight,
  dequantize,
  type Fp8Weight,
  linearQuantized,
  type QuantizedFormat,
  type QuantizedWeight,
  quantizeFp8,
  quantizeQ4,
  quantizeQ8,
  type Weight,
} from './ops/quant.ts';
export { addNoise, randomNormal_ } from './ops/random.ts';
export { allFinite, argmax, dot, logSoftmax, mean, softmax, squaredNorm, sum, topK } from './ops/reduce.ts';
export { reshape, rows } from './ops/reshape.ts';
export { type RopeOptions, type RopeScaling, rope, ropeTable } from './ops/rotary.ts';
export { type TopLogits, topLogits } from './ops/sample.ts';
export { concat, pick, slice, transpose } from './ops/view.ts';
// Tensors and the engine
export { plannedDevice, plannedDevices } from './plan/devices.ts';
export { type Advice, type Plan, type PlanOptions, plan } from './plan/plan.ts';
// Synthesis
export { type DedupeOptions, dedupe, dedupeText, embed } from './synth/dedupe.ts';
export { exportRecords, formatRecord, type RecordFormat } from './synth/export.ts';
export { type FilterOptions, type FilterRecipe, filter, filterRecipe, filterRecipes } from './synth/filter.ts';
export {
  type ContextFormat,
  type ContextOptions,
  type ContextPairs,
  type ContextReport,
  readContextPairs,
} from './synth/instruct/contexts.ts';
export {
  type Brackets,
  bracketsOf,
  contextText,
  exampleText,
  type InstructionExample,
  type InstructionPair,
  type MalformedPair,
  type PairDefect,
  pairsText,
  parsePairs,
} from './synth/instruct/format.ts';
export { passageStage, passagesOf, type RawText, textRecords } from './synth/instruct/passages.ts';
export {
  type ContinualOptions,
  continualMixture,
  type PretrainingRecipe,
  pretrainingMixture,
  type RecipeSources,
  type RunMixture,
  type RunSource,
} from './synth/instruct/recipes.ts';
export {
  documentStage,
  modeWeights,
  type PairRenderOptions,
  type RenderedDocument,
  type RenderMode,
  randomStream,
  renderChain,
  renderExamples,
  renderStage,
} from './synth/instruct/render.ts';
export { reportInstructions } from './synth/instruct/report.ts';
export {
  chainStage,
  type InstructionChain,
  roundStage,
  runsOf,
  type SynthesisReport,
  type SynthesizedText,
  type SynthesizerOptions,
  synthesisReport,
  synthesizeInstructions,
} from './synth/instruct/synthesize.ts';
export { pairTemplates, type TemplateBank } from './synth/instruct/templates.ts';
export {
  type FewShotChain,
  type FewShotOptions,
  type FewShotReport,
  fewShotChains,
  fewShotGroups,
  synthesizerTraining,
  writeFewShotChains,
} from './synth/instruct/training.ts';
export {
  type ComparedRecord,
  type CompareOptions,
  type Comparison,
  compare,
  expectedScore,
  type Judged,
  type JudgeOptions,
  judgePair,
  judgeRubric,
  judgeScore,
  type OtherAnswers,
  otherAnswers,
  type RewardOptions,
  readScore,
  reward,
  type Score,
  type Winner,
} from './synth/judge.ts';
export { type InstructionSampling, type MagpieOptions, magpie, type Steering } from './synth/magpie/magpie.ts';
export { type Refusal, type Sanitized, type SanitizeOptions, sanitize } from './synth/magpie/sanitize.ts';
export {
  type PreQuery,
  type PreQueryFamily,
  preQueryFamilies,
  preQueryFromTemplate,
  preQueryOf,
} from './synth/magpie/templates.ts';
export { type MinHashIndex, type MinHashOptions, minHashIndex } from './synth/minhash.ts';
export { type NeighbourOptions, type Neighbours, neighbours } from './synth/neighbours.ts';
export {
  type GatherOutput,
  type GatherStage,
  jsonlRecords,
  numbers,
  type Outcome,
  type Pipeline,
  type PipelineEvent,
  type PipelineOptions,
  pipeline,
  type RecordSource,
  type RecordStage,
  readManifest,
  readRecords,
  recordsOf,
  runPipeline,
  type Stage,
  type StageContext,
  type StageSummary,
} from './synth/pipeline.ts';
export {
  type Abilities,
  type ChatMessage,
  type CompletionOptions,
  type Meter,
  type Provider,
  ProviderError,
  type Reply,
  type Sampling,
  type TokenScore,
  type Usage,
} from './synth/provider.ts';
export type { HttpOptions } from './synth/providers/http.ts';
export { type LlamaModule, type LlamaOptions, openLlamaProvider } from './synth/providers/llama.ts';
export { type LocalFolderOptions, type LocalOptions, localProvider, openLocalProvider } from './synth/providers/local.ts';
export { type OllamaOptions, ollamaProvider } from './synth/providers/ollama.ts';
export { openProvider, type ProviderSpec } from './synth/providers/open.ts';
export { type OpenAIOptions, openaiProvider } from './synth/providers/openai.ts';
export {
  type Category,
  type Difficulty,
  type InstructionRecord,
  instructionOf,
  type Nearest,
  type Origin,
  type Quality,
  responseOf,
  type Tags,
} from './synth/record.ts';
export { type DatasetReportOptions, renderDatasetReport, reportOutput, writeDatasetReport } from './synth/report.ts';
export {
  loadSynthRun,
  type MagpieRun,
  type MagpieRunInput,
  magpieJsonSchema,
  parseMagpieRun,
  runMagpie,
} from './synth/run.ts';
export { type ServeOptions, type Serving, serve } from './synth/serve.ts';
export {
  type BootstrapOptions,
  bootstrap,
  correlation,
  cost,
  type Interval,
  type Lengths,
  lengths,
  type Prices,
  type WinRate,
  winRate,
} from './synth/statistics.ts';
export { type Histogram, type Spread, type Survey, type Surveyor, surveyor } from './synth/survey.ts';
export { type Mission, missions, type TagOptions, tag } from './synth/tag.ts';
export type { CudaProbe } from './tensor/cuda.ts';
export type { DataArray, DType } from './tensor/dtype.ts';
export {
  currentDevice,
  type Device,
  type EngineOptions,
  init,
  type MemoryReport,
  memory,
  type OpTime,
  type PlannedDevice,
  profile,
  resetPeak,
  shutdown,
  sync,
  trim,
  withDevice,
} from './tensor/engine.ts';
export {
  ConfigError,
  DataError,
  DeviceError,
  DisposedError,
  DTypeError,
  type ErrorData,
  FileError,
  FormatError,
  LimbeckError,
  OutOfMemoryError,
  ShapeError,
  TrainingError,
} from './tensor/errors.ts';
export { type Graph, graph } from './tensor/graph.ts';
export { type BackendInfo, backendInfo } from './tensor/info.ts';
export { type CallOptions, type Op, type OpSpec, op } from './tensor/op.ts';
export { keep, scope } from './tensor/scope.ts';
export { noGrad, recompute, valueAndGrad, zeroGrad } from './tensor/tape.ts';
export { empty, parameter, readAs, Tensor, tensor, toDevice, write, zeros } from './tensor/tensor.ts';
export {
  type ChatTemplate,
  chatTemplate,
  type EncodeChatOptions,
  type EncodedChat,
  encodeChat,
  loadChatTemplate,
  type Message,
  type RenderedChat,
  type RenderOptions,
} from './tokenizer/chat.ts';
export { type ChatStyle, chatStyles } from './tokenizer/styles.ts';
export {
  type EncodeOptions,
  loadTokenizer,
  type TokenDecoder,
  type Tokenizer,
  tokenizerFromJson,
} from './tokenizer/tokenizer.ts';
export { type TokenizerProgress, type TokenizerTraining, trainTokenizer } from './tokenizer/train.ts';
export { type DeviceBatch, upload } from './train/batch.ts';
export {
  type DistillConfig,
  defineRun,
  type FinetuneConfig,
  loadRun,
  type PretrainConfig,
  parseRun,
  type RunConfig,
  type RunInput,
  runJsonSchema,
  type Schedule,
} from './train/config.ts';
export type * from './train/events.ts';
export { finetune } from './train/finetune.ts';
export type { LoopOptions } from './train/loop.ts';
export { createOptimizer, type Optimizer } from './train/optimizer.ts';
export { pretrain } from './train/pretrain.ts';
export { record } from './train/record.ts';
export { type ReportRun, readRun, renderReport, writeReport } from './train/report.ts';
export { learningRate } from './train/schedules.ts';
