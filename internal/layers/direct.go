package layers

import (
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// directAlign is the alignment, in bytes, of memory and length that any file system takes for a write past the page cache.
const directAlign = 4096

// alignedBlock returns an empty block whose memory the disk can be written from.
func alignedBlock() []byte {
	b := make([]byte, blockSize+directAlign)
	skip := 0
	if r := int(uintptr(unsafe.Pointer(&b[0])) % directAlign); r != 0 { // the collector does not move it
		skip = directAlign - r
	}
	return b[skip : skip : skip+blockSize]
}

// writePast lets a layer's tar go to the disk past the page cache, if driver erofs will mount it so too (openIndex): a copy of it in the
// cache would serve nobody, and making that copy costs as much as hashing. Where the file system has no such writes, nothing changes.
func (s *sink) writePast() {
	f, ok := s.f.(*os.File)
	if !ok || !s.past || !canDirect(f.Name()) {
		return
	}
	if setDirect(f, true) == nil {
		s.direct = f
	}
}

// setDirect switches O_DIRECT.
func setDirect(f *os.File, on bool) error {
	flags, err := unix.FcntlInt(f.Fd(), unix.F_GETFL, 0)
	if err != nil {
		return err
	}
	if flags &^= unix.O_DIRECT; on {
		flags |= unix.O_DIRECT
	}
	_, err = unix.FcntlInt(f.Fd(), unix.F_SETFL, flags)
	return err
}

// store appends to the file.
func (s *sink) store(b []byte) error {
	if s.direct != nil && len(b)%directAlign != 0 {
		// The end of the tar, or an odd block: what is left of it, and all that follows, goes the usual way.
		whole := len(b) / directAlign * directAlign
		if _, err := s.f.Write(b[:whole]); err != nil {
			return err
		}
		if err := setDirect(s.direct, false); err != nil {
			return err
		}
		s.direct, b = nil, b[whole:]
	}
	_, err := s.f.Write(b)
	return err
}
