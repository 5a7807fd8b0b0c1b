// Package compress tells by the first bytes how a stream is compressed and undoes it; it compresses with gzip and zstd. It owns no files.
package compress

import (
	"bufio"
	"bytes"
	"compress/bzip2"
	"errors"
	"fmt"
	"io"

	"conex/internal/compress/inflate"
	"conex/internal/ondemand"

	"github.com/klauspost/compress/zstd"
)

// ErrUnsupported says that a stream is compressed in a way that conex can't undo.
var ErrUnsupported = errors.New("compression is not supported")

// MaxWindow bounds the memory in bytes that a zstd or xz stream may ask for; more is refused. The format's own recommendation for
// decoders is 8 MB, `zstd --ultra` uses up to 128 MB, `xz -9` 64 MB.
const MaxWindow = 128 << 20

// Kind is a compression format.
type Kind string

// The formats that Detect knows.
const (
	None  Kind = "none"
	Gzip  Kind = "gzip"
	Zstd  Kind = "zstd"
	Bzip2 Kind = "bzip2"
	Xz    Kind = "xz"
)

// Detect names the format of a stream that begins with head; six bytes suffice.
func Detect(head []byte) Kind {
	switch {
	case bytes.HasPrefix(head, []byte{0x1f, 0x8b, 0x08}):
		return Gzip
	case bytes.HasPrefix(head, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		return Zstd
	case bytes.HasPrefix(head, []byte("BZh")):
		return Bzip2
	case bytes.HasPrefix(head, []byte{0xfd, '7', 'z', 'X', 'Z', 0}):
		return Xz
	case len(head) >= 4 && head[0]&0xf0 == 0x50 && head[1] == 0x2a && head[2] == 0x4d && head[3] == 0x18:
		return Zstd // a skippable frame, as zstd:chunked and pzstd begin with
	}
	return None
}

// Reader returns the uncompressed content of r and how it was compressed; what is not compressed passes through. Close frees the
// decoder, it does not close r. After the content's end, Reader reads r to its end too when the caller reads until io.EOF, so that a
// verifying r gets to its verdict.
func Reader(r io.Reader) (io.ReadCloser, Kind, error) {
	br := bufio.NewReaderSize(r, 64<<10)
	head, err := br.Peek(6)
	if err != nil && err != io.EOF {
		return nil, None, err
	}
	kind := Detect(head)
	switch kind {
	case Gzip:
		z, err := inflate.NewReader(br)
		if err != nil {
			return nil, kind, err
		}
		return &reader{z, func() error { return nil }, br}, kind, nil
	case Zstd:
		// One goroutine, the caller's: more of them take more time altogether, and layers are read several at a time anyway.
		ondemand.Compress()
		z, err := zstd.NewReader(br, zstd.WithDecoderMaxWindow(MaxWindow), zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true))
		if err != nil {
			return nil, kind, fmt.Errorf("zstd: %w", err)
		}
		return &reader{z, func() error { z.Close(); return nil }, br}, kind, nil
	case Bzip2:
		return &reader{bzip2.NewReader(br), func() error { return nil }, br}, kind, nil
	case Xz:
		z, err := newXzReader(br)
		if err != nil {
			return nil, kind, err
		}
		return &reader{z, func() error { return nil }, br}, kind, nil
	}
	return &reader{br, func() error { return nil }, br}, None, nil
}

type reader struct {
	io.Reader
	close func() error
	src   io.Reader
}

func (r *reader) Read(p []byte) (int, error) {
	n, err := r.Reader.Read(p)
	if err == io.EOF {
		if _, serr := io.Copy(io.Discard, r.src); serr != nil {
			err = serr
		}
	}
	return n, err
}

func (r *reader) Close() error { return r.close() }
