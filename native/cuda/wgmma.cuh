// wgmma.mma_async m64nNk16, bf16 x bf16 + f32, for every N. An instruction names its N/2 accumulators one by one, so each N is a
// specialisation; the operand lists are built up in steps of eight columns.
#pragma once
#include <cstdint>

namespace limbeck::cuda::ptx {

// Accumulators 0..N/2, by their place in the asm statement and as operands.
#define LIMBECK_PLACES_8 "%0,%1,%2,%3"
#define LIMBECK_FLOATS_8 "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
#define LIMBECK_PLACES_16 LIMBECK_PLACES_8 ",%4,%5,%6,%7"
#define LIMBECK_FLOATS_16 LIMBECK_FLOATS_8, "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
#define LIMBECK_PLACES_24 LIMBECK_PLACES_16 ",%8,%9,%10,%11"
#define LIMBECK_FLOATS_24 LIMBECK_FLOATS_16, "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11])
#define LIMBECK_PLACES_32 LIMBECK_PLACES_24 ",%12,%13,%14,%15"
#define LIMBECK_FLOATS_32 LIMBECK_FLOATS_24, "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
#define LIMBECK_PLACES_40 LIMBECK_PLACES_32 ",%16,%17,%18,%19"
#define LIMBECK_FLOATS_40 LIMBECK_FLOATS_32, "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19])
#define LIMBECK_PLACES_48 LIMBECK_PLACES_40 ",%20,%21,%22,%23"
#define LIMBECK_FLOATS_48 LIMBECK_FLOATS_40, "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23])
#define LIMBECK_PLACES_56 LIMBECK_PLACES_48 ",%24,%25,%26,%27"
#define LIMBECK_FLOATS_56 LIMBECK_FLOATS_48, "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27])
#define LIMBECK_PLACES_64 LIMBECK_PLACES_56 ",%28,%29,%30,%31"
#define LIMBECK_FLOATS_64 LIMBECK_FLOATS_56, "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define LIMBECK_PLACES_72 LIMBECK_PLACES_64 ",%32,%33,%34,%35"
#define LIMBECK_FLOATS_72 LIMBECK_FLOATS_64, "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35])
#define LIMBECK_PLACES_80 LIMBECK_PLACES_72 ",%36,%37,%38,%39"
#define LIMBECK_FLOATS_80 LIMBECK_FLOATS_72, "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39])
#define LIMBECK_PLACES_88 LIMBECK_PLACES_80 ",%40,%41,%42,%43"
#define LIMBECK_FLOATS_88 LIMBECK_FLOATS_80, "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43])
#define LIMBECK_PLACES_96 LIMBECK_PLACES_88 ",%44,%45,%46,%47"
#define LIMBECK_FLOATS_96 LIMBECK_FLOATS_88, "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47])
#define LIMBECK_PLACES_104 LIMBECK_PLACES_96 ",%48,%49,%50,%51"
#define LIMBECK_FLOATS_104 LIMBECK_FLOATS_96, "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51])
#define LIMBECK_PLACES_112 LIMBECK_PLACES_104 ",%52,%53,%54,%55"
#define LIMBECK_FLOATS_112 LIMBECK_FLOATS_104, "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55])
#define LIMBECK_PLACES_120 LIMBECK_PLACES_112 ",%56,%57,%58,%59"
#define LIMBECK_FLOATS_120 LIMBECK_FLOATS_112, "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59])
#define LIMBECK_PLACES_128 LIMBECK_PLACES_120 ",%60,%61,%62,%63"
#define LIMBECK_FLOATS_128 LIMBECK_FLOATS_120, "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
#define LIMBECK_PLACES_136 LIMBECK_PLACES_128 ",%64,%65,%66,%67"
#define LIMBECK_FLOATS_136 LIMBECK_FLOATS_128, "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67])
#define LIMBECK_PLACES_144 LIMBECK_PLACES_136 ",%68,%69,%70,%71"
#define LIMBECK_FLOATS_144 LIMBECK_FLOATS_136, "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71])
#define LIMBECK_PLACES_152 LIMBECK_PLACES_144 ",%72,%73,%74,%75"
#define LIMBECK_FLOATS_152 LIMBECK_FLOATS_144, "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75])
#define LIMBECK_PLACES_160 LIMBECK_PLACES_152 ",%76,%77,%78,%79"
#define LIMBECK_FLOATS_160 LIMBECK_FLOATS_152, "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79])
#define LIMBECK_PLACES_168 LIMBECK_PLACES_160 ",%80,%81,%82,%83"
#define LIMBECK_FLOATS_168 LIMBECK_FLOATS_160, "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83])
#define LIMBECK_PLACES_176 LIMBECK_PLACES_168 ",%84,%85,%86,%87"
#define LIMBECK_FLOATS_176 LIMBECK_FLOATS_168, "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87])
#define LIMBECK_PLACES_184 LIMBECK_PLACES_176 ",%88,%89,%90,%91"
#define LIMBECK_FLOATS_184 LIMBECK_FLOATS_176, "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91])
#define LIMBECK_PLACES_192 LIMBECK_PLACES_184 ",%92,%93,%94,%95"
#define LIMBECK_FLOATS_192 LIMBECK_FLOATS_184, "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95])
#define LIMBECK_PLACES_200 LIMBECK_PLACES_192 ",%96,%97,%98,%99"
#define LIMBECK_FLOATS_200 LIMBECK_FLOATS_192, "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99])
#define LIMBECK_PLACES_208 LIMBECK_PLACES_200 ",%100,%101,%102,%103"
#define LIMBECK_FLOATS_208 LIMBECK_FLOATS_200, "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103])
#define LIMBECK_PLACES_216 LIMBECK_PLACES_208 ",%104,%105,%106,%107"
#define LIMBECK_FLOATS_216 LIMBECK_FLOATS_208, "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107])
#define LIMBECK_PLACES_224 LIMBECK_PLACES_216 ",%108,%109,%110,%111"
#define LIMBECK_FLOATS_224 LIMBECK_FLOATS_216, "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), "+f"(d[111])
#define LIMBECK_PLACES_232 LIMBECK_PLACES_224 ",%112,%113,%114,%115"
#define LIMBECK_FLOATS_232 LIMBECK_FLOATS_224, "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115])
#define LIMBECK_PLACES_240 LIMBECK_PLACES_232 ",%116,%117,%118,%119"
#define LIMBECK_FLOATS_240 LIMBECK_FLOATS_232, "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119])
#define LIMBECK_PLACES_248 LIMBECK_PLACES_240 ",%120,%121,%122,%123"
#define LIMBECK_FLOATS_248 LIMBECK_FLOATS_240, "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123])
#define LIMBECK_PLACES_256 LIMBECK_PLACES_248 ",%124,%125,%126,%127"
#define LIMBECK_FLOATS_256 LIMBECK_FLOATS_248, "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127])

// p0.. are the places after the accumulators. Immediates: +A, +B, transpositions (1: the operand is MN-major).
#define LIMBECK_WGMMA(N, p0, p1, p2, p3, p4, p5, p6)                                                                            \
  template <>                                                                                                                   \
  struct Wgmma<N> {                                                                                                             \
    template <int TransposedA, int TransposedB>                                                                                 \
    __device__ __forceinline__ static void run(float (&d)[N / 2], uint64_t a, uint64_t b, int add) {                            \
      LIMBECK_SM90A("{\n.reg .pred p;\nsetp.ne.b32 p, %" p2 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N                        \
                    "k16.f32.bf16.bf16 {" LIMBECK_PLACES_##N "}, %" p0 ", %" p1 ", p, 1, 1, %" p3 ", %" p4 ";\n}\n"             \
                    : LIMBECK_FLOATS_##N                                                                                        \
                    : "l"(a), "l"(b), "r"(add), "n"(TransposedA), "n"(TransposedB));                                            \
    }                                                                                                                           \
    template <int TransposedB>                                                                                                  \
    __device__ __forceinline__ static void run(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, int add) {                \
      LIMBECK_SM90A("{\n.reg .pred p;\nsetp.ne.b32 p, %" p5 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N                        \
                    "k16.f32.bf16.bf16 {" LIMBECK_PLACES_##N "}, {%" p0 ",%" p1 ",%" p2 ",%" p3 "}, %" p4                        \
                    ", p, 1, 1, %" p6 ";\n}\n"                                                                                  \
                    : LIMBECK_FLOATS_##N                                                                                        \
                    : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(TransposedB));                          \
    }                                                                                                                           \
  };

template <int N>
struct Wgmma;  // N is a multiple of 8 up to 256
LIMBECK_WGMMA(8, "4", "5", "6", "7", "8", "9", "10")
LIMBECK_WGMMA(16, "8", "9", "10", "11", "12", "13", "14")
LIMBECK_WGMMA(24, "12", "13", "14", "15", "16", "17", "18")
LIMBECK_WGMMA(32, "16", "17", "18", "19", "20", "21", "22")
LIMBECK_WGMMA(40, "20", "21", "22", "23", "24", "25", "26")
LIMBECK_WGMMA(48, "24", "25", "26", "27", "28", "29", "30")
LIMBECK_WGMMA(56, "28", "29", "30", "31", "32", "33", "34")
LIMBECK_WGMMA(64, "32", "33", "34", "35", "36", "37", "38")
LIMBECK_WGMMA(72, "36", "37", "38", "39", "40", "41", "42")
LIMBECK_WGMMA(80, "40", "41", "42", "43", "44", "45", "46")
LIMBECK_WGMMA(88, "44", "45", "46", "47", "48", "49", "50")
LIMBECK_WGMMA(96, "48", "49", "50", "51", "52", "53", "54")
LIMBECK_WGMMA(104, "52", "53", "54", "55", "56", "57", "58")
LIMBECK_WGMMA(112, "56", "57", "58", "59", "60", "61", "62")
LIMBECK_WGMMA(120, "60", "61", "62", "63", "64", "65", "66")
LIMBECK_WGMMA(128, "64", "65", "66", "67", "68", "69", "70")
LIMBECK_WGMMA(136, "68", "69", "70", "71", "72", "73", "74")
LIMBECK_WGMMA(144, "72", "73", "74", "75", "76", "77", "78")
LIMBECK_WGMMA(152, "76", "77", "78", "79", "80", "81", "82")
LIMBECK_WGMMA(160, "80", "81", "82", "83", "84", "85", "86")
LIMBECK_WGMMA(168, "84", "85", "86", "87", "88", "89", "90")
LIMBECK_WGMMA(176, "88", "89", "90", "91", "92", "93", "94")
LIMBECK_WGMMA(184, "92", "93", "94", "95", "96", "97", "98")
LIMBECK_WGMMA(192, "96", "97", "98", "99", "100", "101", "102")
LIMBECK_WGMMA(200, "100", "101", "102", "103", "104", "105", "106")
LIMBECK_WGMMA(208, "104", "105", "106", "107", "108", "109", "110")
LIMBECK_WGMMA(216, "108", "109", "110", "111", "112", "113", "114")
LIMBECK_WGMMA(224, "112", "113", "114", "115", "116", "117", "118")
LIMBECK_WGMMA(232, "116", "117", "118", "119", "120", "121", "122")
LIMBECK_WGMMA(240, "120", "121", "122", "123", "124", "125", "126")
LIMBECK_WGMMA(248, "124", "125", "126", "127", "128", "129", "130")
LIMBECK_WGMMA(256, "128", "129", "130", "131", "132", "133", "134")
#undef LIMBECK_WGMMA
#undef LIMBECK_PLACES_8
#undef LIMBECK_FLOATS_8
#undef LIMBECK_PLACES_16
#undef LIMBECK_FLOATS_16
#undef LIMBECK_PLACES_24
#undef LIMBECK_FLOATS_24
#undef LIMBECK_PLACES_32
#undef LIMBECK_FLOATS_32
#undef LIMBECK_PLACES_40
#undef LIMBECK_FLOATS_40
#undef LIMBECK_PLACES_48
#undef LIMBECK_FLOATS_48
#undef LIMBECK_PLACES_56
#undef LIMBECK_FLOATS_56
#undef LIMBECK_PLACES_64
#undef LIMBECK_FLOATS_64
#undef LIMBECK_PLACES_72
#undef LIMBECK_FLOATS_72
#undef LIMBECK_PLACES_80
#undef LIMBECK_FLOATS_80
#undef LIMBECK_PLACES_88
#undef LIMBECK_FLOATS_88
#undef LIMBECK_PLACES_96
#undef LIMBECK_FLOATS_96
#undef LIMBECK_PLACES_104
#undef LIMBECK_FLOATS_104
#undef LIMBECK_PLACES_112
#undef LIMBECK_FLOATS_112
#undef LIMBECK_PLACES_120
#undef LIMBECK_FLOATS_120
#undef LIMBECK_PLACES_128
#undef LIMBECK_FLOATS_128
#undef LIMBECK_PLACES_136
#undef LIMBECK_FLOATS_136
#undef LIMBECK_PLACES_144
#undef LIMBECK_FLOATS_144
#undef LIMBECK_PLACES_152
#undef LIMBECK_FLOATS_152
#undef LIMBECK_PLACES_160
#undef LIMBECK_FLOATS_160
#undef LIMBECK_PLACES_168
#undef LIMBECK_FLOATS_168
#undef LIMBECK_PLACES_176
#undef LIMBECK_FLOATS_176
#undef LIMBECK_PLACES_184
#undef LIMBECK_FLOATS_184
#undef LIMBECK_PLACES_192
#undef LIMBECK_FLOATS_192
#undef LIMBECK_PLACES_200
#undef LIMBECK_FLOATS_200
#undef LIMBECK_PLACES_208
#undef LIMBECK_FLOATS_208
#undef LIMBECK_PLACES_216
#undef LIMBECK_FLOATS_216
#undef LIMBECK_PLACES_224
#undef LIMBECK_FLOATS_224
#undef LIMBECK_PLACES_232
#undef LIMBECK_FLOATS_232
#undef LIMBECK_PLACES_240
#undef LIMBECK_FLOATS_240
#undef LIMBECK_PLACES_248
#undef LIMBECK_FLOATS_248
#undef LIMBECK_PLACES_256
#undef LIMBECK_FLOATS_256

}  // namespace limbeck::cuda::ptx
