"""Passages that many texts quote, so that a model may know them by heart: in the public domain, but for a licence."""

PASSAGES = {
    "Gettysburg Address": (
        "Four score and seven years ago our fathers brought forth on this continent, a new nation, conceived in "
        "Liberty, and dedicated to the proposition that all men are created equal. Now we are engaged in a great "
        "civil war, testing whether that nation, or any nation so conceived and so dedicated, can long endure."
    ),
    "Declaration of Independence": (
        "We hold these truths to be self-evident, that all men are created equal, that they are endowed by their "
        "Creator with certain unalienable Rights, that among these are Life, Liberty and the pursuit of "
        "Happiness. That to secure these rights, Governments are instituted among Men, deriving their just powers"
        " from the consent of the governed"
    ),
    "Preamble": (
        "We the People of the United States, in Order to form a more perfect Union, establish Justice, insure "
        "domestic Tranquility, provide for the common defence, promote the general Welfare, and secure the "
        "Blessings of Liberty to ourselves and our Posterity, do ordain and establish this Constitution for the "
        "United States of America."
    ),
    "First Amendment": (
        "Congress shall make no law respecting an establishment of religion, or prohibiting the free exercise "
        "thereof; or abridging the freedom of speech, or of the press; or the right of the people peaceably to "
        "assemble, and to petition the Government for a redress of grievances."
    ),
    "Hamlet": (
        "To be, or not to be, that is the question: Whether 'tis nobler in the mind to suffer the slings and "
        "arrows of outrageous fortune, or to take arms against a sea of troubles, and by opposing end them. To "
        "die, to sleep, no more; and by a sleep to say we end the heart-ache"
    ),
    "Romeo and Juliet": (
        "O Romeo, Romeo, wherefore art thou Romeo? Deny thy father and refuse thy name. Or if thou wilt not, be "
        "but sworn my love, and I'll no longer be a Capulet. 'Tis but thy name that is my enemy: thou art "
        "thyself, though not a Montague."
    ),
    "Lord's Prayer": (
        "Our Father, who art in heaven, hallowed be thy name; thy kingdom come, thy will be done on earth as it "
        "is in heaven. Give us this day our daily bread, and forgive us our trespasses, as we forgive those who "
        "trespass against us; and lead us not into temptation, but deliver us from evil."
    ),
    "Genesis": (
        "In the beginning God created the heaven and the earth. And the earth was without form, and void; and "
        "darkness was upon the face of the deep. And the Spirit of God moved upon the face of the waters. And God"
        " said, Let there be light: and there was light."
    ),
    "Psalm 23": (
        "The Lord is my shepherd; I shall not want. He maketh me to lie down in green pastures: he leadeth me "
        "beside the still waters. He restoreth my soul: he leadeth me in the paths of righteousness for his "
        "name's sake. Yea, though I walk through the valley of the shadow of death"
    ),
    "A Tale of Two Cities": (
        "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of "
        "foolishness, it was the epoch of belief, it was the epoch of incredulity, it was the season of Light, it"
        " was the season of Darkness, it was the spring of hope, it was the winter of despair"
    ),
    "Pride and Prejudice": (
        "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in "
        "want of a wife. However little known the feelings or views of such a man may be on his first entering a "
        "neighbourhood, this truth is so well fixed in the minds of the surrounding families"
    ),
    "Alice in Wonderland": (
        "Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do:"
        " once or twice she had peeped into the book her sister was reading, but it had no pictures or "
        "conversations in it, and what is the use of a book, thought Alice"
    ),
    "The Raven": (
        "Once upon a midnight dreary, while I pondered, weak and weary, over many a quaint and curious volume of "
        "forgotten lore, while I nodded, nearly napping, suddenly there came a tapping, as of some one gently "
        "rapping, rapping at my chamber door."
    ),
    "The Star": (
        "Twinkle, twinkle, little star, how I wonder what you are! Up above the world so high, like a diamond in "
        "the sky. When the blazing sun is gone, when he nothing shines upon, then you show your little light, "
        "twinkle, twinkle, all the night."
    ),
    "Mary's Lamb": (
        "Mary had a little lamb, its fleece was white as snow, and everywhere that Mary went, the lamb was sure "
        "to go. It followed her to school one day, which was against the rule; it made the children laugh and "
        "play to see a lamb at school."
    ),
    "The Star-Spangled Banner": (
        "Oh, say can you see, by the dawn's early light, what so proudly we hailed at the twilight's last "
        "gleaming? Whose broad stripes and bright stars, through the perilous fight, o'er the ramparts we "
        "watched, were so gallantly streaming? And the rockets' red glare, the bombs bursting in air"
    ),
    "Lorem ipsum": (
        "Lorem ipsum dolor sit amet, consectetur adipiscing elit, sed do eiusmod tempor incididunt ut labore et "
        "dolore magna aliqua. Ut enim ad minim veniam, quis nostrud exercitation ullamco laboris nisi ut aliquip "
        "ex ea commodo consequat."
    ),
    "MIT licence": (
        "Permission is hereby granted, free of charge, to any person obtaining a copy of this software and "
        'associated documentation files (the "Software"), to deal in the Software without restriction, including '
        "without limitation the rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell "
        "copies of the Software"
    ),
}
