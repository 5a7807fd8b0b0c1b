//go:build !amd64 && !arm64

package nsfork

import "os"

// canShare says that every child has memory of its own.
const canShare = false

func (p *Program) startShared(Attr) (int, *os.File, error) { panic("not reached") }
