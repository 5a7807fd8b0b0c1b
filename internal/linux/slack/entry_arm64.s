#include "textflag.h"

// conexEntry is as on amd64: see there.
TEXT conexEntry(SB), NOSPLIT|NOFRAME, $0
	MOVD $167, R8 // prctl
	MOVD $30, R0  // PR_GET_TIMERSLACK
	SVC
	MOVD $50000, R1 // usual; another one is somebody's wish
	CMP  R1, R0
	BNE  go
	MOVD $167, R8
	MOVD $29, R0     // PR_SET_TIMERSLACK
	MOVD $500000, R1 // wide
	SVC

go:
	MOVD ZR, R0
	B    _rt0_arm64_linux(SB)
