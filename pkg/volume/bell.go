package volume

// bell wakes a goroutine that receives from it. Rings that it has not heard yet are one.
type bell chan struct{}

func newBell() bell { return make(bell, 1) }

func (b bell) ring() {
	select {
	case b <- struct{}{}:
	default:
	}
}
