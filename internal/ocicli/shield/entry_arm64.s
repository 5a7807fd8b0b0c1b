#include "textflag.h"

// conexRuntimeEntry is as on amd64: see there.
//
// R19 is the stack as the kernel left it, R20 where the environment begins, R21 its number of words with the nil.
TEXT conexRuntimeEntry(SB), NOSPLIT|NOFRAME, $0
	MOVD RSP, R19
	MOVD (R19), R0
	ADD  $16, R19, R20
	ADD  R0<<3, R20, R20
	ADD  $8, R19, R1

argument:
	ADD   $8, R1, R1
	CMP   R20, R1
	BHS   go
	MOVD  (R1), R2
	CBZ   R2, go
	MOVWU (R2), R3
	MOVD  $0x006e7572, R4 // "run\0"
	CMP   R4, R3
	BEQ   wanted
	MOVD  $0x63657865, R4 // "exec"
	CMP   R4, R3
	BEQ   exec
	MOVD  $0x61657263, R4 // "crea"
	CMP   R4, R3
	BNE   argument
	MOVWU 4(R2), R3
	AND   $0xffffff, R3, R3
	MOVD  $0x006574, R4 // "te\0"
	CMP   R4, R3
	BEQ   wanted
	B     argument

exec:
	MOVBU 4(R2), R3
	CBNZ  R3, argument

wanted:
	MOVD $0, R21
	MOVD $0x55525f58454e4f43, R9  // "CONEX_RU"
	MOVD $0x45535f454d49544e, R10 // "NTIME_SE"
	MOVD $0x3d464c, R11           // "LF="

variable:
	MOVD  (R20)(R21<<3), R2
	ADD   $1, R21, R21
	CBZ   R2, view
	MOVD  (R2), R3
	CMP   R9, R3
	BNE   variable
	MOVD  8(R2), R3
	CMP   R10, R3
	BNE   variable
	MOVWU 16(R2), R3
	AND   $0xffffff, R3, R3
	CMP   R11, R3
	BEQ   go
	B     variable

view:
	MOVD $428, R8 // open_tree
	MOVD $-100, R0
	MOVD $conexRuntimeExe(SB), R1
	MOVD $0x80001, R2 // OPEN_TREE_CLONE|OPEN_TREE_CLOEXEC
	SVC
	TBNZ $63, R0, go
	MOVD R0, R22
	MOVD $442, R8 // mount_setattr
	MOVD $conexRuntimeEmpty(SB), R1
	MOVD $0x1000, R2 // AT_EMPTY_PATH
	MOVD $conexRuntimeAttr(SB), R3
	MOVD $32, R4
	SVC
	CBNZ R0, close
	MOVD $25, R8 // fcntl
	MOVD R22, R0
	MOVD $0, R1 // F_DUPFD
	MOVD $200, R2 // minFD
	SVC
	TBNZ $63, R0, close
	MOVD R0, R23

	// The variable, from its end: a nil, the descriptor's number, the name.
	SUB  $8, R19, R5
	MOVD ZR, (R5)
	MOVD $10, R4

digit:
	UDIV R4, R0, R2
	MSUB R4, R0, R2, R3 // R3 = R0 - R2*R4
	ADD  $48, R3, R3
	SUB  $1, R5, R5
	MOVB R3, (R5)
	MOVD R2, R0
	CBNZ R0, digit
	SUB  $19, R5, R5
	MOVD R9, (R5)
	MOVD R10, 8(R5)
	MOVD $76, R3 // "L"
	MOVB R3, 16(R5)
	MOVD $70, R3 // "F"
	MOVB R3, 17(R5)
	MOVD $61, R3 // "="
	MOVB R3, 18(R5)

	// The environment again, that first and the number of processors (Procs) last.
	SUB  R21<<3, R19, R3
	SUB  $88, R3, R3
	AND  $~15, R3, R3
	MOVD R5, (R3)
	ADD  $8, R3, R6
	MOVD $0, R7

copy:
	MOVD (R20)(R7<<3), R4
	MOVD R4, (R6)(R7<<3)
	ADD  $1, R7, R7
	CMP  R21, R7
	BNE  copy
	MOVD $conexRuntimeProcs(SB), R4
	ADD  R21<<3, R3, R6
	MOVD R4, (R6)
	MOVD ZR, 8(R6)

	MOVD R3, R25 // the environment
	MOVD $167, R8 // prctl
	MOVD $30, R0 // PR_GET_TIMERSLACK
	SVC
	MOVD $50000, R1 // the kernel's; another one is somebody's wish
	CMP  R1, R0
	BNE  execute
	MOVD $167, R8 // prctl
	MOVD $29, R0 // PR_SET_TIMERSLACK
	MOVD $2000000, R1 // slack.wider
	SVC

execute:
	MOVD $281, R8 // execveat
	MOVD R23, R0
	MOVD $conexRuntimeEmpty(SB), R1
	ADD  $8, R19, R2
	MOVD R25, R3
	MOVD $0x1000, R4 // AT_EMPTY_PATH
	SVC // returns with an error only
	MOVD $167, R8 // prctl
	MOVD $30, R0 // PR_GET_TIMERSLACK
	SVC
	MOVD $2000000, R1
	CMP  R1, R0
	BNE  closeBoth
	MOVD $167, R8 // prctl
	MOVD $29, R0 // PR_SET_TIMERSLACK
	MOVD $50000, R1
	SVC

closeBoth:
	MOVD $57, R8 // close
	MOVD R23, R0
	SVC

close:
	MOVD $57, R8
	MOVD R22, R0
	SVC

go:
	MOVD R19, RSP
	MOVD ZR, R0
	B    _rt0_arm64_linux(SB)
