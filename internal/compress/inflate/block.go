package inflate

import (
	"encoding/binary"
)

// Margins of the fast loop: what one turn of it reads and writes at most, with what its wide loads and stores touch beyond.
const (
	inMargin  = 32
	outMargin = 320
)

// state is where in the stream the decoder stands between two calls.
type state uint8

const (
	atBlock  state = iota // a block's header comes
	inStored              // stored bytes come
	inCodes               // codes come
	atEnd                 // the last block has ended
)

// blocks decodes from d.in into out from op on, until fewer than outMargin bytes of room are left, or the deflate stream ends. It
// returns where it came to. Distances may reach back to out[base].
func (d *Reader) blocks(out []byte, op, base int) (int, error) {
	for d.state != atEnd && op <= len(out)-outMargin {
		var err error
		switch d.state {
		case atBlock:
			err = d.header()
		case inStored:
			if d.ip == d.end {
				d.more()
				if d.ip == d.end {
					return op, d.truncated()
				}
			}
			n := copy(out[op:], d.in[d.ip:min(d.end, d.ip+d.stored)])
			op += n
			d.ip += n
			if d.stored -= n; d.stored == 0 {
				d.endBlock()
			}
		case inCodes:
			if d.end-d.ip < inMargin && d.srcErr == nil {
				d.more()
			}
			if d.end-d.ip >= inMargin {
				op, err = d.fast(out, op, base)
			} else {
				op, err = d.careful(out, op, base)
			}
		}
		if err != nil {
			return op, err
		}
	}
	return op, nil
}

func (d *Reader) endBlock() {
	d.state = atBlock
	if d.final {
		d.state = atEnd
	}
}

// header reads the header of a block.
func (d *Reader) header() error {
	if !d.need(3) {
		return d.truncated()
	}
	h := d.take(3)
	d.final = h&1 != 0
	switch h >> 1 {
	case 0:
		d.drop()
		var b [4]byte
		if err := d.full(b[:]); err != nil {
			return err
		}
		n := binary.LittleEndian.Uint16(b[:])
		if n != ^binary.LittleEndian.Uint16(b[2:]) {
			return ErrCorrupt
		}
		d.state, d.stored = inStored, int(n)
		if n == 0 {
			d.endBlock()
		}
		return nil
	case 1:
		if !d.fixed {
			var lens [numLit + numDist]uint8
			for i := range lens {
				switch {
				case i < 144:
					lens[i] = 8
				case i < 256:
					lens[i] = 9
				case i < 280:
					lens[i] = 7
				case i < numLit:
					lens[i] = 8
				default:
					lens[i] = 5
				}
			}
			if !build(d.lit[:], litBits, lens[:numLit], d.symbols[:]) || !build(d.dist[:], distBits, lens[numLit:], distances[:]) {
				return ErrCorrupt
			}
			d.fixed = true
		}
	case 2:
		if err := d.codes(); err != nil {
			return err
		}
	default:
		return ErrCorrupt
	}
	d.state = inCodes
	return nil
}

// codes reads a block's own codes.
func (d *Reader) codes() error {
	d.fixed = false
	if !d.need(14) {
		return d.truncated()
	}
	nlit, ndist, nlens := int(d.take(5))+257, int(d.take(5))+1, int(d.take(4))+4
	if nlit > maxLit || ndist > maxDist {
		return ErrCorrupt
	}
	var lens [maxLit + maxDist + 138]uint8 // a repetition may be as long as 138; whether it fits is looked at once
	for _, at := range lensOrder[:nlens] {
		if !d.need(3) {
			return d.truncated()
		}
		lens[at] = uint8(d.take(3))
	}
	var table [lensSize]uint32
	if !build(table[:], lensBits, lens[:numLens], lensSymbols[:]) {
		return ErrCorrupt
	}
	lens = [len(lens)]uint8{}
	for i := 0; i < nlit+ndist; {
		d.need(lensBits + 7) // at the source's end there may be less
		e := table[d.bits&(1<<lensBits-1)]
		if e&isSpecial != 0 {
			return ErrCorrupt
		}
		if n := uint(e & 0xff); n > d.nb {
			return d.truncated()
		}
		d.take(uint(e & 0xff))
		var value uint8
		var n uint
		switch sym := e >> 16; sym {
		case 16:
			if i == 0 {
				return ErrCorrupt
			}
			value = lens[i-1]
			n = 2
		case 17:
			n = 3
		case 18:
			n = 7
		default:
			lens[i] = uint8(sym)
			i++
			continue
		}
		if n > d.nb {
			return d.truncated()
		}
		extra := int(d.take(n))
		if n == 7 {
			extra += 8
		}
		for k := range extra + 3 {
			lens[i+k] = value
		}
		i += extra + 3
		if i > nlit+ndist {
			return ErrCorrupt
		}
	}
	if !build(d.lit[:], litBits, lens[:nlit], d.symbols[:]) || !build(d.dist[:], distBits, lens[nlit:nlit+ndist], distances[:]) {
		return ErrCorrupt
	}
	return nil
}

// careful decodes like fast, one symbol a turn and with a look at each bound: near the end of the input.
func (d *Reader) careful(out []byte, op, base int) (int, error) {
	for op <= len(out)-outMargin && (d.end-d.ip < inMargin || d.srcErr != nil) {
		d.need(48) // the longest length and distance; at the source's end there may be less
		e := d.lit[d.bits&(1<<litBits-1)]
		if e&(isLiteral|isSpecial|isSecond) == isSpecial|isSecond {
			if d.nb < litBits {
				return op, d.truncated()
			}
			d.take(litBits)
			e = d.lit[uint64(e>>16)+d.bits&(1<<(e>>8&15)-1)]
		}
		length, ok := d.value(e)
		switch {
		case !ok:
			return op, d.truncated()
		case e&isLiteral != 0:
			out[op] = byte(e >> 16)
			op++
			continue
		case e&isSpecial != 0:
			if e&isEnd == 0 {
				return op, ErrCorrupt
			}
			d.endBlock()
			return op, nil
		}
		e = d.dist[d.bits&(1<<distBits-1)]
		if e&(isSpecial|isSecond) == isSpecial|isSecond {
			if d.nb < distBits {
				return op, d.truncated()
			}
			d.take(distBits)
			e = d.dist[uint64(e>>16)+d.bits&(1<<(e>>8&15)-1)]
		}
		dist, ok := d.value(e)
		if !ok {
			return op, d.truncated()
		}
		if e&isSpecial != 0 || dist > op-base {
			return op, ErrCorrupt
		}
		for range length {
			out[op] = out[op-dist]
			op++
		}
	}
	return op, nil
}

// value takes the bits of an entry that does not lead to a second table, and returns base and extra bits together.
func (d *Reader) value(e uint32) (int, bool) {
	n, code := uint(e&0xff), uint(e>>8&15)
	if n > d.nb {
		return 0, false
	}
	b := d.take(n)
	return int(e>>16) + int(b>>code), true
}
