package inflate

import "math/bits"

// An entry of a decoding table says what the next bits of the stream mean:
//
//	31      literal: bits 16-23 are the byte
//	16-30   base of the length or of the distance; where the second table begins
//	15      special: neither literal nor base. With bit 14 it leads to a second table, as wide as bits 8-11 say; with bit 13
//	        the block ends; with neither no code begins with these bits.
//	8-11    how long the code is
//	0-7     how many bits to take: those of the code and the extra bits behind it
//
// A code that is longer than the first table is wide has its first bits taken by the entry that leads to the second one; the entry
// there counts the rest only.
const (
	isLiteral = 1 << 31
	isSpecial = 1 << 15
	isSecond  = 1 << 14
	isEnd     = 1 << 13
)

// Widths of the first tables in bits, and how many entries first and second ones have together at most. The second number is a matter
// of counting all complete codes of 286 and 30 symbols of up to 15 bits; build checks it all the same.
const (
	litBits, litSize   = 11, 2342
	distBits, distSize = 8, 402
	lensBits, lensSize = 7, 128
)

const (
	maxCode   = 15 // bits of the longest code
	maxLit    = 286
	maxDist   = 30
	numLit    = 288 // those that the fixed code has codes for
	numDist   = 32
	numLens   = 19
	endSymbol = 256
)

// lengths are the entries of the symbols from 257 on, but for the code; 286 and 287 exist in the fixed code only and mean nothing.
var lengths = [numLit - 257]uint32{
	3 << 16, 4 << 16, 5 << 16, 6 << 16, 7 << 16, 8 << 16, 9 << 16, 10 << 16,
	11<<16 | 1, 13<<16 | 1, 15<<16 | 1, 17<<16 | 1, 19<<16 | 2, 23<<16 | 2, 27<<16 | 2, 31<<16 | 2,
	35<<16 | 3, 43<<16 | 3, 51<<16 | 3, 59<<16 | 3, 67<<16 | 4, 83<<16 | 4, 99<<16 | 4, 115<<16 | 4,
	131<<16 | 5, 163<<16 | 5, 195<<16 | 5, 227<<16 | 5, 258 << 16, isSpecial, isSpecial,
}

// distances are the entries of the distances' symbols, but for the code.
var distances = [numDist]uint32{
	1 << 16, 2 << 16, 3 << 16, 4 << 16, 5<<16 | 1, 7<<16 | 1, 9<<16 | 2, 13<<16 | 2, 17<<16 | 3, 25<<16 | 3,
	33<<16 | 4, 49<<16 | 4, 65<<16 | 5, 97<<16 | 5, 129<<16 | 6, 193<<16 | 6, 257<<16 | 7, 385<<16 | 7, 513<<16 | 8, 769<<16 | 8,
	1025<<16 | 9, 1537<<16 | 9, 2049<<16 | 10, 3073<<16 | 10, 4097<<16 | 11, 6145<<16 | 11, 8193<<16 | 12, 12289<<16 | 12,
	16385<<16 | 13, 24577<<16 | 13, isSpecial, isSpecial,
}

// lensSymbols are the entries of the code for lengths of codes.
var lensSymbols = [numLens]uint32{
	0 << 16, 1 << 16, 2 << 16, 3 << 16, 4 << 16, 5 << 16, 6 << 16, 7 << 16, 8 << 16, 9 << 16, 10 << 16, 11 << 16, 12 << 16, 13 << 16, 14 << 16, 15 << 16,
	16 << 16, 17 << 16, 18 << 16,
}

// lensOrder is the order in which a block's header gives the lengths of the code for lengths.
var lensOrder = [numLens]uint8{16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15}

// build fills the table, whose first part is width bits wide, for the canonical code with the given lengths, one a symbol, 0 for those
// without a code. symbols are the entries but for the code. It refuses codes that are ambiguous and those that are incomplete, except
// for the two that compressors write: of no symbol at all, and of one symbol with one bit.
func build(table []uint32, width uint, lens []uint8, symbols []uint32) bool {
	var count [maxCode + 1]uint16
	for _, n := range lens {
		count[n&maxCode]++
	}
	count[0] = 0
	var first [maxCode + 2]uint16 // where the symbols of a length begin when sorted by it
	left, longest := 1, 0
	for n := 1; n <= maxCode; n++ {
		if count[n] > 0 {
			longest = n
		}
		left = left<<1 - int(count[n])
		if left < 0 {
			return false
		}
		first[n+1] = first[n] + count[n]
	}
	if left > 0 && longest > 1 || longest == 0 {
		clearTable(table[:1<<width])
		return longest == 0
	}
	var sorted [numLit]uint16
	next := first
	for sym, n := range lens {
		if n &= maxCode; n != 0 {
			sorted[next[n]%numLit] = uint16(sym)
			next[n]++
		}
	}
	if left > 0 { // one symbol, with the code 0
		clearTable(table[:1<<width])
		e := symbols[sorted[0]] + 1<<8 + 1
		for i := 0; i < 1<<width; i += 2 {
			table[i] = e
		}
		return true
	}
	// The codes in order, each with its bits reversed, as the stream has them. What was filled for shorter codes is doubled.
	code, i := uint(0), 0
	n := uint(1)
	for ; n <= width; n++ {
		if n > 1 {
			copy(table[1<<(n-1):1<<n], table[:1<<(n-1)])
		}
		for range count[n] {
			table[code] = symbols[sorted[i]] + uint32(n<<8+n)
			i++
			code = increment(code, n)
		}
	}
	used := uint(1) << width
	prefix, second := ^uint(0), uint(0) // of the present second table: its bits in the first one, its width
	begin := uint(0)
	for ; n <= maxCode; n++ {
		for c := count[n]; c > 0; c-- {
			if p := code & (1<<width - 1); p != prefix {
				// As wide as it takes for the codes that follow with this prefix.
				second = n - width
				space := int(c)
				for space < 1<<second {
					second++
					space = space<<1 + int(count[width+second])
				}
				prefix, begin = p, used
				used += 1 << second
				if used > uint(len(table)) {
					return false
				}
				table[p] = uint32(begin<<16 | isSpecial | isSecond | second<<8 | width)
			}
			e := symbols[sorted[i]] + uint32((n-width)<<8+n-width)
			for at := code >> width; at < 1<<second; at += 1 << (n - width) {
				table[begin+at] = e
			}
			i++
			code = increment(code, n)
		}
	}
	return true
}

// increment returns the code of n bits that follows, with the bits of both reversed.
func increment(code, n uint) uint {
	rest := code ^ (1<<n - 1) // ones where code has zeros
	if rest == 0 {
		return 0
	}
	top := uint(1) << (bits.Len(rest) - 1)
	return code&(top-1) | top
}

func clearTable(t []uint32) {
	for i := range t {
		t[i] = isSpecial
	}
}
