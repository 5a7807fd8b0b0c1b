package inflate

import (
	"encoding/binary"
	"unsafe"
)

// fast decodes codes while there are at least inMargin bytes of input and outMargin bytes of room, which is looked at once a turn. A
// turn is up to three literals, or up to two and one match. It leaves at the end of the block too.
//
// All its loads and stores that are not checked are between in[ip] and in[ip+inMargin], between out[op] and out[op+outMargin], and
// behind out[base] as the check of the distance has it.
func (d *Reader) fast(out []byte, op, base int) (int, error) {
	src, dst := unsafe.Pointer(unsafe.SliceData(d.in)), unsafe.Pointer(unsafe.SliceData(out))
	lit, dists := &d.lit, &d.dist
	ip, inLast, outLast := d.ip, d.end-inMargin, len(out)-outMargin
	bits, nb := d.bits, uint64(d.nb)
	var err error

	// Of nb the lowest six bits count. Bits beyond them in bits are what the input has there, so that loading them once more changes
	// nothing.
	bits |= load(src, ip) << (nb & 63)
	ip += int((63 - nb&63) >> 3)
	nb |= 56
	e := lit[bits&(1<<litBits-1)]
	for ip <= inLast && op <= outLast {
		saved := bits
		bits >>= e & 63
		nb -= uint64(e)
		if e&isLiteral != 0 {
			*(*byte)(unsafe.Add(dst, op)) = byte(e >> 16)
			op++
			e = lit[bits&(1<<litBits-1)]
			saved = bits
			bits >>= e & 63
			nb -= uint64(e)
			if e&isLiteral != 0 {
				*(*byte)(unsafe.Add(dst, op)) = byte(e >> 16)
				op++
				e = lit[bits&(1<<litBits-1)]
				saved = bits
				bits >>= e & 63
				nb -= uint64(e)
				if e&isLiteral != 0 {
					*(*byte)(unsafe.Add(dst, op)) = byte(e >> 16)
					op++
					bits |= load(src, ip) << (nb & 63)
					ip += int((63 - nb&63) >> 3)
					nb |= 56
					e = lit[bits&(1<<litBits-1)]
					continue
				}
			}
		}
		if e&isSpecial != 0 {
			if e&isSecond != 0 {
				e = lit[uint64(e>>16)+bits&(1<<(e>>8&15)-1)]
				saved = bits
				bits >>= e & 63
				nb -= uint64(e)
			}
			if e&isLiteral != 0 {
				*(*byte)(unsafe.Add(dst, op)) = byte(e >> 16)
				op++
				bits |= load(src, ip) << (nb & 63)
				ip += int((63 - nb&63) >> 3)
				nb |= 56
				e = lit[bits&(1<<litBits-1)]
				continue
			}
			if e&isSpecial != 0 {
				if e&isEnd == 0 {
					err = ErrCorrupt
				} else {
					d.endBlock()
				}
				break
			}
		}
		length := int(e>>16) + int(saved&(1<<(e&63)-1)>>(e>>8&15))
		if nb&63 < 28 {
			bits |= load(src, ip) << (nb & 63)
			ip += int((63 - nb&63) >> 3)
			nb |= 56
		}
		e = dists[bits&(1<<distBits-1)]
		if e&isSpecial != 0 {
			if e&isSecond == 0 {
				err = ErrCorrupt
				break
			}
			bits >>= distBits
			nb -= distBits
			e = dists[uint64(e>>16)+bits&(1<<(e>>8&15)-1)]
			if e&isSpecial != 0 {
				err = ErrCorrupt
				break
			}
		}
		dist := int(e>>16) + int(bits&(1<<(e&63)-1)>>(e>>8&15))
		bits >>= e & 63
		nb -= uint64(e)
		bits |= load(src, ip) << (nb & 63)
		ip += int((63 - nb&63) >> 3)
		nb |= 56
		e = lit[bits&(1<<litBits-1)]
		if dist > op-base {
			err = ErrCorrupt
			break
		}
		from, to := op-dist, op
		op += length
		if dist < 8 {
			if dist == 1 {
				v := uint64(*(*byte)(unsafe.Add(dst, from))) * 0x0101010101010101
				for ; to < op; to += 16 {
					store(dst, to, v)
					store(dst, to+8, v)
				}
				continue
			}
			// What was copied and what it was copied from are a pattern twice as long.
			for dist < 8 {
				store(dst, to, load(dst, from))
				to += dist
				dist *= 2
			}
		}
		for {
			store(dst, to, load(dst, from))
			store(dst, to+8, load(dst, from+8))
			if to += 16; to >= op {
				break
			}
			from += 16
		}
	}
	d.ip, d.bits, d.nb = ip, bits, uint(nb&63)
	return op, err
}

func load(b unsafe.Pointer, i int) uint64 {
	return binary.LittleEndian.Uint64((*[8]byte)(unsafe.Add(b, i))[:])
}

func store(b unsafe.Pointer, i int, v uint64) {
	binary.LittleEndian.PutUint64((*[8]byte)(unsafe.Add(b, i))[:], v)
}
